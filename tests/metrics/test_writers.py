import glob
import io
import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from google.protobuf import message_factory
from rich.console import Console
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from ropewalk.core.errors import ConfigError
from ropewalk.core.log import log
from ropewalk.metrics import writers

Event: Any = message_factory.GetMessageClass(event_pb2.DESCRIPTOR.message_types_by_name["Event"])


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def events(directory):
    """The events of a TensorBoard directory by a plain TFRecord reader, checksums compared."""
    found = []
    for path in sorted(glob.glob(f"{directory}/*tfevents*")):
        data, at = Path(path).read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            assert struct.unpack_from("<I", data, at + 8)[0] == masked_crc32c(data[at : at + 8])
            record = data[at + 12 : at + 12 + length]
            assert struct.unpack_from("<I", data, at + 12 + length)[0] == masked_crc32c(record)
            found.append(Event.FromString(record))
            at += 16 + length
    return found


def scalars(directory):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(directory)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def test_lines_are_read_back_as_written(tmp_path):
    lines = writers.JsonLines(tmp_path)
    lines.write(1, {"loss": 2.5, "tokens": 64})
    lines.event(1, "skipped", reason="loss is not finite", ids=[3, 4])
    lines.sample(1, "Once\n", 'she said "no"\u2028 \U0001f980')
    on_disk = read(tmp_path / "metrics.jsonl")  # before close: flushed as written
    assert [{k: v for k, v in row.items() if k != "time"} for row in on_disk] == [
        {"step": 1, "loss": 2.5, "tokens": 64},
        {"step": 1, "event": "skipped", "reason": "loss is not finite", "ids": [3, 4]},
    ]
    sample = json.loads((tmp_path / "samples.jsonl").read_bytes().split(b"\n")[0])
    assert (sample["prompt"], sample["text"]) == ("Once\n", 'she said "no"\u2028 \U0001f980')
    lines.close()
    lines.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_json_cannot_hold_is_null(tmp_path, value):
    lines = writers.JsonLines(tmp_path)
    lines.write(1, {"loss": value, "nested": {"all": [value, 1.0]}})
    lines.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["loss"] is None
    assert row["nested"]["all"] == [None, 1.0]


def test_numbers_of_numpy_and_jax_are_plain_numbers(tmp_path):
    lines = writers.JsonLines(tmp_path)
    values = (np.float32(0.5), np.int64(3), jax.numpy.float32(0.25), ml_dtypes.bfloat16(2.0))
    lines.write(7, {"all": values, "one": np.arange(2)})
    lines.close()
    row = read(tmp_path / "metrics.jsonl")[0]
    assert row["all"] == [0.5, 3, 0.25, 2.0]
    assert row["one"] == [0, 1]


def test_after_a_resume_each_step_is_there_once(tmp_path):
    lines = writers.JsonLines(tmp_path)
    for step in range(1, 11):
        lines.write(step, {"loss": float(step)})
        lines.sample(step, "a", "first")
    lines.event(10, "saved")
    lines.close()
    lines = writers.JsonLines(tmp_path, resumed=6)
    for step in range(7, 13):
        lines.write(step, {"loss": -float(step)})
        lines.sample(step, "a", "second")
    lines.close()
    rows = read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] > 0 for row in rows] == [True] * 6 + [False] * 6
    assert [row["step"] for row in read(tmp_path / "samples.jsonl")] == list(range(1, 13))


def test_a_fresh_start_in_the_directory_of_a_run_that_saved_nothing_begins_anew(tmp_path):
    lines = writers.JsonLines(tmp_path)
    lines.sample(0, "a", "untrained")
    lines.write(1, {"loss": 1.0})
    lines.close()
    writers.JsonLines(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"step": 5, "lo', b'{"step": 5, "loss": 1.0}', b"\x00\x00\xff"])
def test_a_torn_last_line_is_healed(tmp_path, torn, caplog):
    lines = writers.JsonLines(tmp_path)
    for step in range(1, 5):
        lines.write(step, {"loss": 1.0})
    lines.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with caplog.at_level(logging.WARNING, log.name):
        lines = writers.JsonLines(tmp_path, resumed=5)
    lines.write(6, {"loss": 1.0})
    lines.close()
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 6]
    assert "metrics.jsonl: dropped 1 unreadable line" in caplog.text


def test_kill_9_loses_no_line_that_was_written(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from ropewalk.metrics.writers import JsonLines\n"
        "lines = JsonLines(sys.argv[1])\n"
        "for step in range(1, 201): lines.write(step, {'loss': 1.0 / step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    source = Path(writers.__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(source)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    rows = read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 201))


def test_tensorboard_files_hold_what_was_written(tmp_path):
    board = writers.TensorBoard(tmp_path)
    written = []
    for step in range(1, 40):
        board.write(step, {"loss": 4.0 / step, "tokens": 64 * step})
        written += [(step, "train/loss", 4.0 / step), (step, "train/tokens", 64 * step)]
    board.write(39, {"eval_loss": 0.5, "eval_bits_per_byte": math.nan})
    board.sample(39, "Once", " more\nunto <b>")
    board.close()
    read_back = scalars(tmp_path)
    assert [row[:2] for row in read_back[:-2]] == [row[:2] for row in written]
    np.testing.assert_allclose(
        [row[2] for row in read_back[:-2]], [row[2] for row in written], rtol=1e-7
    )
    assert read_back[-2] == (39, "eval/loss", 0.5)
    assert math.isnan(read_back[-1][2])
    texts = [value for event in events(tmp_path) for value in event.summary.value]
    shown = [value.tensor.string_val[0] for value in texts if value.tag.startswith("samples")]
    assert shown == [b"    Once more\n    unto <b>"]


def test_tensorboard_hides_the_steps_after_the_resumed_one(tmp_path):
    first = writers.TensorBoard(tmp_path)
    for step in range(1, 11):
        first.write(step, {"loss": 1.0})
    first.close()
    second = writers.TensorBoard(tmp_path, resumed=6)
    for step in range(7, 12):
        second.write(step, {"loss": 2.0})
    second.close()
    assert len(glob.glob(f"{tmp_path}/*tfevents*")) == 2  # also when both began in one second
    shown: dict[int, float] = {}
    for event in events(tmp_path):  # as TensorBoard reads: a start at step n purges from n on
        if event.HasField("session_log"):
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            assert event.step not in shown
            shown[event.step] = value.simple_value
    assert shown == {step: 1.0 if step <= 6 else 2.0 for step in range(1, 12)}


def test_wandb_that_is_not_installed_is_one_clear_error_and_nothing_is_touched(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    lines = writers.JsonLines(tmp_path)
    lines.write(1, {"loss": 1.0})
    lines.close()
    with pytest.raises(
        ConfigError, match=r"metrics\.wandb = 'mine'.*pip install 'ropewalk\[wandb\]'"
    ):
        writers.open_writers(writers.Config(wandb="mine"), tmp_path, 10)
    assert len(read(tmp_path / "metrics.jsonl")) == 1


def progress(style, **options):
    out = io.StringIO()
    terminal = style == "live"
    console = Console(file=out, force_terminal=terminal, width=100, soft_wrap=True, highlight=False)
    return writers.Progress(100, style, console=console, **options), out


def test_without_a_terminal_a_plain_line_now_and_then(monkeypatch):
    line, out = progress("auto", every_s=1000.0)
    line.event(0, "started", mfu_label="product rate")
    rates = {"tokens_per_s": 12345.6, "mfu": 0.4321, "eta_s": 200.0}
    for step in range(1, 101):
        line.write(step, {"loss": 3.0, "skipped": 0, **rates})
    line.write(100, {"eval_loss": 2.0, "eval_perplexity": 7.389, "eval_bits_per_byte": 1.5})
    line.sample(100, "Once [bold]", " more\nunto the breach")
    line.close()
    assert out.getvalue().splitlines() == [
        "step 1/100  loss 3.0000  12,346 tokens/s  product rate 43.2%  3 min 20 s left",
        "step 100/100  loss 3.0000  12,346 tokens/s  product rate 43.2%  3 min 20 s left",
        "step 100  held-out loss 2.0000  perplexity 7.39  1.500 bits per byte",
        "step 100  the model writes:",
        "  Once [bold] more",
        "  unto the breach",
    ]


def test_an_event_shows_five_of_many_documents_and_keeps_all(tmp_path):
    names = [f"data.jsonl:{i}" for i in range(12)]
    line, out = progress("plain")
    lines = writers.JsonLines(tmp_path)
    for writer in (line, lines):
        writer.event(4, "skipped", in_a_row=1, batch=names)
        writer.event(5, "skipped", in_a_row=2, batch=names[:5])
    five = ", ".join(names[:5])
    assert out.getvalue().splitlines() == [
        f"step 4  skipped: in_a_row 1, batch {five} and 7 more",
        f"step 5  skipped: in_a_row 2, batch {five}",
    ]
    assert read(tmp_path / "metrics.jsonl")[0]["batch"] == names
    lines.close()


def test_on_a_terminal_log_lines_stand_above_the_live_line(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(log, "handlers", [handler])
    line, out = progress("live")
    line.write(3, {"loss": math.nan, "mfu": None})
    log.warning("a word from elsewhere")
    line.close()
    line.close()
    assert "a word from elsewhere" in out.getvalue()
    assert "step 3/100" in out.getvalue().rpartition("a word from elsewhere")[2]
    assert stderr.getvalue() == ""
    assert handler.stream is stderr  # given back


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (18240, "5 h 04 min"),
        (183600, "2 d 03 h"),
        (math.nan, "?"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds, words):
    assert writers.duration(seconds) == words


def test_open_writers_writes_everywhere_and_other_processes_nothing(tmp_path, monkeypatch):
    settings = writers.Config(progress="none")
    everything = writers.open_writers(settings, tmp_path / "run", 10)
    everything.event(0, "started", **writers.facts(10))
    everything.write(1, {"loss": 1.0})
    everything.sample(1, "a", "b")
    everything.close()
    started, row = read(tmp_path / "run" / "metrics.jsonl")
    assert started["versions"]["jax"] == jax.__version__
    assert row["loss"] == 1.0
    assert (1, "train/loss", 1.0) in scalars(tmp_path / "run" / "tensorboard")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    other = writers.open_writers(settings, tmp_path / "other", 10)
    other.write(1, {"loss": 1.0})
    other.close()
    assert not (tmp_path / "other").exists()
