"""HTTP/1.1 as uvicorn speaks it, with what it lacks: a bound on the head of a request, and on how
long a client may take to send one or to read its answer. What is no request is answered as
OpenAI's errors are."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ropewalk.serve.door import error

MOST_HEAD_BYTES = 64 * 1024
ARRIVAL_S = 30.0
"""of a whole request, from the connection or its first byte on"""
READING_S = 120.0
"""in which a client must take some of what waits for it"""
_LINGER_S = 2.0
_END_S = 5


def config(app: Any, **more: Any) -> uvicorn.Config:
    """How `app` is served; `more` goes before what is said here."""
    chosen: dict[str, Any] = {
        "http": Protocol, "ws": "none", "lifespan": "on", "log_config": None, "access_log": False,
        "server_header": False, "timeout_keep_alive": 75, "backlog": 2048,
        # When answers have ended already: for who does not read his, or sends no more.
        "timeout_graceful_shutdown": _END_S,
    }  # fmt: skip
    return uvicorn.Config(app, **{**chosen, **more})


class Protocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._wrong = HTTPStatus.BAD_REQUEST, "this is no request of HTTP/1.1"
        # How many heads began, whether the last is incomplete, and bytes of it after the first
        # piece of data, which is small itself.
        self._heads, self._in_head, self._head_bytes = 0, False, 0
        self._refused = False
        self._arrival: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begins to wait for a request."""
        super().connection_made(transport)
        self._await()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing more."""
        self._arrived()
        self._read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request, or of several."""
        if self._refused:
            return
        heads = self._heads
        super().data_received(data)
        if self._in_head and heads == self._heads:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(*_TOO_LARGE)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._heads, self._in_head, self._head_bytes = self._heads + 1, True, 0
        if self._arrival is None:
            self._await()

    def on_headers_complete(self) -> None:
        """The head is there. What is raised here comes to `send_400_response`."""
        self._in_head = False
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MOST_HEAD_BYTES:
            self._wrong = _TOO_LARGE
            raise ValueError("head")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is there."""
        super().on_message_complete()
        self._arrived()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._reading = self._reading or self.loop.call_later(READING_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._read()

    def send_400_response(self, msg: str) -> None:
        """What came cannot be understood."""
        self._refuse(*self._wrong)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Ends the connection, and says why where no answer is half told. What the client still
        sends is taken for a while, else the system would throw away what it was told."""
        self._refused, self._in_head, cycle = True, False, self.cycle
        self._arrived()
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.close()
        else:
            body = json.dumps(error(status, message)).encode()
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self._arrival = self.loop.call_later(_LINGER_S, self.transport.close)

    def _await(self) -> None:
        self._arrival = self.loop.call_later(ARRIVAL_S, self._late)

    def _arrived(self) -> None:
        if self._arrival is not None:
            self._arrival = self._arrival.cancel()

    def _read(self) -> None:
        if self._reading is not None:
            self._reading = self._reading.cancel()

    def _late(self) -> None:
        cycle, self._arrival = self.cycle, None
        waits = cycle is not None and not cycle.response_complete
        if self.pipeline or (waits and not cycle.more_body):
            self._await()  # another request is being answered, and this one waits for that
        elif self._in_head or waits:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT, f"the request has not arrived within {ARRIVAL_S} s"
            )
        else:
            self.transport.close()


_TOO_LARGE = (
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"the head of the request is larger than {MOST_HEAD_BYTES} bytes",
)
