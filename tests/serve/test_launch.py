"""`ropewalk serve` as a process: it starts, drains on SIGTERM, comes back after SIGKILL."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from ropewalk.serve import launch
from tests.serve.tiny_server import tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@contextmanager
def running(directory: Path, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address, when it is ready."""
    command = [sys.executable, "-m", "ropewalk", "serve", str(directory), "--port", "0", *more]
    # One device, as users have: with the kernels for it.
    flags = "--xla_backend_optimization_level=0"
    environment = {**os.environ, "GLIBC_TUNABLES": "", "XLA_FLAGS": flags}
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stderr=told, env=environment)
        try:
            yield process, _address(process, told)
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], told: IO[str]) -> str:
    while True:
        ended = process.poll() is not None
        told.seek(0)
        text = told.read()
        if found := re.search(r"served at (http://\S+)", text):
            return found[1]
        assert not ended, text
        time.sleep(0.05)


def post(address: str, body: dict[str, Any], key: str = "") -> tuple[int, bytes]:
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    data = json.dumps({"model": "model", **body}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


LONG = {"prompt": "abc", "max_tokens": 150, "temperature": 0, "ignore_eos": True}


def test_sigterm_lets_answers_end(directory, tmp_path):
    """Those that are being written end whole, a new one is refused, and the exit code is 0."""
    more = "--name", "model", "--slots", "4", "--trace", str(tmp_path)
    with running(directory, *more) as (process, address):
        whole = post(address, LONG)
        assert whole[0] == 200
        assert [*tmp_path.rglob("*.xplane.pb")]  # of its first steps
        found: list[tuple[int, bytes]] = []

        def ask() -> None:
            found.append(post(address, LONG))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.15)
        process.send_signal(signal.SIGTERM)
        late = None
        for _ in range(100):
            try:
                late = post(address, LONG)
            except OSError:  # it has ended
                break
            if late[0] == 503:
                break
        for thread in threads:
            thread.join()
        assert process.wait(timeout=40) == 0
    text = json.loads(whole[1])["choices"][0]["text"]
    statuses = [status for status, _ in found]
    assert set(statuses) <= {200, 503} and 200 in statuses
    for status, body in found:
        assert status == 503 or json.loads(body)["choices"][0]["text"] == text
    assert late is None or late[0] in (503, 200)


def test_it_comes_back_after_a_kill_and_asks_for_a_key(directory, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    more = "--name", "model", "--slots", "4", "--api-key-file", str(keys)
    texts = []
    for _ in range(2):
        with running(directory, *more) as (process, address):
            assert post(address, LONG)[0] == 401
            assert post(address, LONG, "third")[0] == 401
            status, body = post(address, LONG, "second")
            assert status == 200
            texts.append(json.loads(body)["choices"][0]["text"])
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("drain", "signals"), [("0.2", 1), ("30", 2)])
def test_what_has_not_ended_in_time_is_cut(directory, drain, signals):
    """The time is over, or a second signal says so."""
    asked = {**LONG, "max_tokens": 1000, "stream": True}
    found: list[tuple[int, bytes]] = []
    with running(directory, "--name", "model", "--slots", "2", "--drain", drain) as started:
        process, address = started
        threads = [
            threading.Thread(target=lambda: found.append(post(address, asked))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        began = time.monotonic()
        for thread in threads:
            thread.join()
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - began < 10
    last = found[-1][1].decode().split("\n\n")[-3:]
    assert "the server is shutting down" in last[0] and last[1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Llama-3.2-1B", "Llama-3.2-1B"), ("models/Llama-3.2-1B/", "Llama-3.2-1B"),
        (".", "here-1.5"), ("../here-1.5/.", "here-1.5"), ("sub/..", "here-1.5"),
        ("q/phi-3.5.Q4_0.gguf", "phi-3.5.Q4_0"), ("link.gguf", "link"), ("llama/tiny", "tiny"),
    ],
)  # fmt: skip
def test_a_model_is_called_by_the_last_part_of_its_path(model, name, tmp_path, monkeypatch):
    (tmp_path / "here-1.5").mkdir()
    monkeypatch.chdir(tmp_path / "here-1.5")
    Path("link.gguf").symlink_to("0f3a")
    assert launch._name(model) == name


@pytest.mark.parametrize(("value", "keys"), [("sk-1\n", ("sk-1",)), (" \n", ()), ("", ())])
def test_blanks_are_no_part_of_the_key_in_the_environment(value, keys, monkeypatch):
    monkeypatch.setenv("ROPEWALK_API_KEY", value)
    assert launch._keys(None) == keys


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--api-key-file", "/nowhere"), "--api-key-file /nowhere cannot be read"),
        (("--max-length", "5000"), "5000 tokens are asked for; the model has 1024"),
        (("--host", "192.0.2.1"), "--host is an address of this machine"),
    ],
)
def test_what_cannot_be_served_is_told_at_once(directory, more, says):
    command = [sys.executable, "-m", "ropewalk", "serve", str(directory), "--port", "0", *more]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert says in ended.stderr and "Traceback" not in ended.stderr
