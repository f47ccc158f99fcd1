"""Connections: what is no request, what is too much of one, and who is too slow."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import uvicorn

from ropewalk.serve import wire

GET = b"GET / HTTP/1.1\r\nhost: x\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\n"
PATIENCE_S = 0.4
LARGE = b"x" * 2**16


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Tells the size of the body, after 0.8 s at /slow; at /endless it writes until nobody is left
    and then notes so."""
    body, more = 0, True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        body += len(message.get("body", b""))
    if scope["path"] == "/slow":
        await asyncio.sleep(2 * PATIENCE_S)
    if scope["path"] == "/endless":
        scope["state"]["ended"].clear()
        leaving = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not leaving.done():
            await send({"type": "http.response.body", "body": LARGE, "more_body": True})
            await asyncio.sleep(0)
        scope["state"]["ended"].set()
        return
    told = str(body).encode()
    length = [(b"content-length", str(len(told)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": told})


@contextmanager
def listening(config: uvicorn.Config) -> Iterator[tuple[tuple[str, int], uvicorn.Server]]:
    """The address of what uvicorn serves in a thread, and the server."""
    web = uvicorn.Server(config)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(web.serve([bound])))
        thread.start()
        try:
            while not web.started:
                time.sleep(0.01)
            yield bound.getsockname(), web
        finally:
            web.should_exit = True
            thread.join(timeout=30)


@pytest.fixture(scope="module")
def ended() -> threading.Event:
    return threading.Event()


@pytest.fixture(scope="module")
def place(ended: threading.Event) -> Iterator[tuple[str, int]]:
    bounds = pytest.MonkeyPatch()
    bounds.setattr(wire, "ARRIVAL_S", PATIENCE_S)
    bounds.setattr(wire, "READING_S", PATIENCE_S)

    async def stated(scope: Any, receive: Any, send: Any) -> None:
        scope["state"] = {"ended": ended}
        await app(scope, receive, send)

    with listening(wire.config(stated, lifespan="off")) as (address, _):
        yield address
    bounds.undo()


def told(place: tuple[str, int], *pieces: bytes, wait: float = 0.0, limit: float = 5.0) -> bytes:
    """Everything that comes back until the server closes."""
    with socket.create_connection(place, timeout=limit) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(wait)
        answer = b""
        while piece := connection.recv(2**16):
            answer += piece
        return answer


def refused(answer: bytes) -> tuple[int, str]:
    """The status and message of an answer that is an error as OpenAI's are."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head and b"connection: close" in head, answer[:500]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return int(head.split()[1]), error["message"]


WRONG = {
    "no method": b"BREW / HTTP/1.1\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a header without a colon": GET + b"broken\r\n\r\n",
    "a header with NUL": GET + b"a: b\x00c\r\n\r\n",
    "a folded header": GET + b"a: b\r\n c\r\n\r\n",
    "a header without a name": GET + b": b\r\n\r\n",
    "a blank before the colon": GET + b"a : b\r\n\r\n",
    "two lengths": POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\na",
    "a negative length": POST + b"content-length: -1\r\n\r\n",
    "a length in words": POST + b"content-length: ten\r\n\r\n",
    "an endless length": POST + b"content-length: " + b"9" * 30 + b"\r\n\r\n",
    "a length and chunks": POST
    + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "no size of a chunk": POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    "an endless chunk": POST + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n",
    "a chunk that is longer": POST + b"transfer-encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n",
    "an address with blanks": b"GET /a b HTTP/1.1\r\n\r\n",
    "more than its length": POST + b"content-length: 1\r\n\r\nabc\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("request_", WRONG.values(), ids=WRONG)
def test_what_is_no_request_is_told_so(place: tuple[str, int], request_: bytes) -> None:
    began, answer = time.monotonic(), told(place, request_)
    # What ended before the mistake was answered.
    answer = answer[answer.rindex(b"HTTP/1.1 ") :]
    assert refused(answer)[0] == 400
    assert time.monotonic() - began < 1


HEADS = {
    "one header": GET + b"a: " + b"x" * 2**20 + b"\r\n\r\n",
    "many headers": GET + b"".join(b"h%d: x\r\n" % i for i in range(20_000)) + b"\r\n",
    "an address": b"GET /" + b"x" * 2**20 + b" HTTP/1.1\r\n\r\n",
    "a name": GET + b"x" * 2**20 + b": y\r\n\r\n",
    "in one piece": GET + b"a: " + b"x" * 70_000 + b"\r\n\r\n",
    "of a key": GET + b"authorization: Bearer " + b"x" * 2**20 + b"\r\n\r\n",
}


@pytest.mark.parametrize("request_", HEADS.values(), ids=HEADS)
def test_a_large_head_is_refused(place: tuple[str, int], request_: bytes) -> None:
    status, message = refused(told(place, request_))
    assert status == 431 and str(wire.MOST_HEAD_BYTES) in message


def test_of_a_head_without_end_little_is_taken(place: tuple[str, int]) -> None:
    with socket.create_connection(place, timeout=5) as connection:
        connection.sendall(GET + b"a: ")
        piece, answer = b"x" * 2**14, b""
        connection.setblocking(False)
        sent, until = 0, time.monotonic() + 5
        while not answer and time.monotonic() < until:
            try:
                sent += connection.send(piece)
                answer = connection.recv(2**16)
            except BlockingIOError:
                time.sleep(0.001)
    assert refused(answer)[0] == 431
    assert sent < 2**23  # what lies in the buffers of the system


def test_a_head_of_ordinary_size_is_taken(place: tuple[str, int]) -> None:
    request = GET + b"a: " + b"x" * 60_000 + b"\r\nconnection: close\r\n\r\n"
    assert told(place, request).startswith(b"HTTP/1.1 200")


SLOW = {
    "half a line": (b"GET / HT",),
    "half a head": (GET,),
    "half a body": (POST + b"content-length: 10\r\n\r\nabc",),
    "half a chunk": (POST + b"transfer-encoding: chunked\r\n\r\na\r\nabc",),
    "a head byte by byte": tuple(GET[i : i + 1] for i in range(8)),
    "a body byte by byte": (POST + b"content-length: 99\r\n\r\n", *[b"x"] * 8),
}


@pytest.mark.parametrize("pieces", SLOW.values(), ids=SLOW)
def test_who_sends_too_slowly_is_let_go(place: tuple[str, int], pieces: tuple[bytes, ...]) -> None:
    began = time.monotonic()
    status, message = refused(told(place, *pieces, wait=PATIENCE_S / 10))
    assert status == 408 and f"{PATIENCE_S} s" in message
    assert PATIENCE_S * 0.9 < time.monotonic() - began < PATIENCE_S + 1


def test_who_says_nothing_is_let_go(place: tuple[str, int]) -> None:
    assert told(place) == b""


def test_who_waits_for_an_answer_is_not_too_slow(place: tuple[str, int]) -> None:
    """Also where the next request lies behind the one that is answered."""
    slow = b"POST /slow HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"
    last = POST + b"content-length: 5\r\nconnection: close\r\n\r\nabcde"
    answer = told(place, slow + last)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b"\r\n\r\n3") < answer.index(b"\r\n\r\n5")


def test_who_never_reads_is_let_go(place: tuple[str, int], ended: threading.Event) -> None:
    with socket.create_connection(place, timeout=5) as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.1)
        assert ended.wait(PATIENCE_S + 3)


def test_who_leaves_in_the_middle_leaves_nothing(place: tuple[str, int]) -> None:
    for piece in (b"GET", GET, POST + b"content-length: 10\r\n\r\nabc", *WRONG.values()):
        with socket.create_connection(place, timeout=5) as connection:
            connection.sendall(piece)
    assert told(place, GET + b"connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_many_requests_of_one_connection(place: tuple[str, int]) -> None:
    """Each has the same time to arrive, however old the connection is."""
    with closing(http.client.HTTPConnection(*place, timeout=5)) as connection:
        connection.connect()
        first = connection.sock
        until = time.monotonic() + 2 * PATIENCE_S
        while time.monotonic() < until:
            connection.request("GET", "/")
            assert connection.getresponse().read() == b"0"
            time.sleep(PATIENCE_S / 5)
        assert connection.sock is first
