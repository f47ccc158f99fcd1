"""What every request passes: its id, its key, its size, and the log of it. Whatever goes wrong
behind the door comes out as OpenAI's errors do, without traces, paths or addresses."""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from ropewalk.core.log import log

MOST_BYTES = 4 * 2**20
"""of a body"""
FAILED = "the server failed; the request may be sent again"
_OPEN = ("/health",)
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooLarge(HTTPException):
    """A body over MOST_BYTES. What reads it lets this pass, as it does not other exceptions."""

    def __init__(self) -> None:
        super().__init__(413, f"the body is larger than {MOST_BYTES} bytes")


def error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error's body as OpenAI's clients read it."""
    kind = _KINDS.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    told = {"message": _text(message), "type": kind, "param": param and _text(param), "code": code}
    return {"error": told}


def _text(text: str) -> str:
    """One that UTF-8 can write, and not without end."""
    return text[:2000].encode("utf-8", "replace").decode()


class Door:
    """ASGI middleware around the whole server."""

    def __init__(
        self, app: Any, keys: Sequence[str] = (), allow: Callable[[str], bool] | None = None
    ):
        """`keys`: one must come as a bearer token or as Basic's password, if there are any;
        `allow(path)` says whether new requests are still taken."""
        self._app, self._allow = app, allow or (lambda path: True)
        # Digests are compared, so that neither content nor length of a key shows in the time.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, given = time.monotonic(), _header(scope, b"x-request-id")
        request_id = given.decode() if _fit(given) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        told: dict[str, Any] = {"status": 0, "bytes": 0}

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
            elif message["type"] == "http.response.body":
                told["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            await self._pass(scope, receive, sent)
        except TooLarge as wrong:
            if not told["status"]:
                await _answer(sent, wrong.status_code, wrong.detail)
        except Exception:
            log.exception("request %s failed", request_id)
            if not told["status"]:
                await _answer(sent, 500, FAILED)
        finally:
            log.info(
                json.dumps({
                    "request": request_id, "method": scope["method"], "path": scope["path"][:200],
                    "status": told["status"], "bytes": told["bytes"],
                    "duration_s": round(time.monotonic() - started, 4),
                })
            )  # fmt: skip

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if self._keys and path not in _OPEN and not self._known(scope):
            # A browser that opens the page asks for the key itself; no script is made to.
            scheme = b"Basic" if path == "/" else b"Bearer"
            headers = [(b"www-authenticate", scheme + b' realm="ropewalk"')]
            await _answer(send, 401, "give one of the server's keys as a bearer token", headers)
            return
        if not self._allow(path):
            headers = [(b"retry-after", b"5")]
            await _answer(send, 503, "the server is shutting down; try another", headers)
            return
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > MOST_BYTES:
            raise TooLarge
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BYTES:
                raise TooLarge
            return message

        await self._app(scope, bounded, send)

    def _known(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return False
        kind, _, key = values[0].partition(b" ")
        if kind.lower() == b"basic":  # name:key
            try:
                key = base64.b64decode(key.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return False
        elif kind.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        return any(matches)


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")


def _fit(request_id: bytes) -> bool:
    """Whether a client's own id can be told again as it is."""
    return 0 < len(request_id) <= 64 and request_id.replace(b"-", b"").isalnum()


async def _answer(
    send: Send, status: int, message: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    body = json.dumps(error(status, message)).encode()
    kind = (b"content-type", b"application/json")
    size = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [kind, size, *headers]})
    await send({"type": "http.response.body", "body": body})
