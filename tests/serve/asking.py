"""Sends the cases of `bad_inputs`, and finds fault with what comes back."""

import dataclasses
import http.client
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.serve.bad_inputs import CHAT, COMPLETIONS, Case

# Promised. What takes longer is timed once more: a machine that others use is held up at times.
MOST_S = 1.0
# A trace, an object or class of Python, a place in memory, an address of the network.
TOLD = re.compile(
    r"Traceback|\.py\b|site-packages|<class|<[\w.]+ object|\bobject at\b|0x[0-9a-f]{5,}|\{'|"
    r"\b127\.0\.0\.1\b"
)
OWN_PATHS = (sys.prefix, str(Path.home()), tempfile.gettempdir(), str(Path(__file__).parents[2]))
TYPES = {401: "authentication_error", 404: "not_found_error"}


@dataclass(frozen=True)
class Told:
    """An answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    seconds: float


def ask(address: str, case: Case, key: str = "") -> Told:
    """The answer to a case; `key` is sent where the case has none of its own."""
    place, began = address.removeprefix("http://"), time.monotonic()
    with closing(http.client.HTTPConnection(place, timeout=10 * MOST_S)) as connection:
        connection.putrequest(case.method, case.path)
        headers = [*case.headers, *([("authorization", f"Bearer {key}")] if key else ())]
        body = case.sent
        if isinstance(body, bytes):
            headers.append(("content-length", str(len(body))))
        elif body is not None:
            headers.append(("transfer-encoding", "chunked"))
        for name, value in headers:
            connection.putheader(name, value.encode())
        connection.endheaders(body, encode_chunked=not isinstance(body, bytes | None))
        answer = connection.getresponse()
        read = answer.read()
        return Told(answer.status, answer.headers, read, time.monotonic() - began)


def fault(case: Case, told: Told) -> str | None:
    """What is wrong with the answer to a case, if anything."""
    if told.seconds > MOST_S:
        return f"took {told.seconds:.2f} s"
    if told.status not in case.status:
        return f"status {told.status}, not {case.status}: {told.body[:300]!r}"
    if not told.headers["x-request-id"] and told.status != 431:
        return "no x-request-id"
    warning = told.headers["warning"] or ""
    if not (warning.isascii() and warning.isprintable() and len(warning) < 1000):
        return f"header {warning!r:.300}"
    if told.status < 400 or case.method == "HEAD":
        return None
    return _wrong_error(case, told)


def _wrong_error(case: Case, told: Told) -> str | None:
    try:
        body = json.loads(told.body)
        error = body["error"]
        message, param = error["message"], error["param"]
    except (ValueError, LookupError, TypeError):
        return f"no error as OpenAI's are: {told.body[:300]!r}"
    kind = TYPES.get(told.status, "invalid_request_error")
    leaks = [path for path in OWN_PATHS if path in message] + TOLD.findall(message)
    if set(body) != {"error"} or set(error) != {"message", "type", "param", "code"}:
        return f"fields {sorted(body)}, {sorted(error)}"
    if not message or len(told.body) > 3000 or error["type"] != kind or leaks:
        return f"{error['type']} of {len(told.body)} bytes, {leaks}: {message:.300}"
    at = f"{param or ''}."
    if case.param is not None and not at.startswith(f"{case.param}."):
        return f"param {param!r}, not {case.param!r}: {message:.300}"
    if case.param is not None and case.param.rpartition(".")[2] not in message:
        return f"says nothing of {case.param!r}: {message:.300}"
    return None


def faults(address: str, cases: Iterable[Case], key: str = "") -> tuple[int, list[str]]:
    """How many cases there are, and what is wrong with the answers to them."""
    count, found = 0, []
    for case in cases:
        count += 1
        try:
            told = ask(address, case, key)
            if told.seconds > MOST_S:
                told = dataclasses.replace(told, seconds=ask(address, case, key).seconds)
            wrong = fault(case, told)
        except (OSError, http.client.HTTPException) as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            found.append(f"{case.about}\n    {wrong}")
    return count, found


NEIGHBOURS: tuple[Case, ...] = (
    Case(COMPLETIONS, {
        "model": "tiny", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0,
        "stream": True, "logprobs": 0, "ignore_eos": True,
    }),
    Case(CHAT, {
        "model": "tiny", "messages": [{"role": "user", "content": "A list, please."}],
        "max_tokens": 24, "temperature": 0, "stream": True,
        "response_format": {"type": "regex", "regex": "([a-z]{3}, ){9}"},
    }),
)  # fmt: skip


def answer(address: str, neighbour: Case, key: str = "") -> list[Any]:
    """What a stream tells, without what is new each time."""
    told = ask(address, neighbour, key)
    lines = [line for line in told.body.decode().splitlines() if line]
    assert told.status == 200 and lines[-1] == "data: [DONE]", told
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    told_of = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = [one.get("text") or one.get("delta", {}).get("content") or "" for one in told_of]
    return ["".join(texts), *(one["finish_reason"] for one in told_of if one["finish_reason"])]


@contextmanager
def neighbours(address: str, key: str = "") -> Iterator[None]:
    """Others who are answered meanwhile, again and again; raises if any of them is answered
    anything but what it was at first."""
    first = [answer(address, one, key) for one in NEIGHBOURS]
    over, others, rounds = threading.Event(), [], [0] * len(NEIGHBOURS)

    def stream(which: int) -> None:
        while not over.is_set() or not rounds[which]:
            try:
                found = answer(address, NEIGHBOURS[which], key)
            except Exception as error:
                found = error
            if found != first[which]:
                others.append(found)
            rounds[which] += 1

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(len(NEIGHBOURS))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not others, (len(others), rounds, first, others[:3])
