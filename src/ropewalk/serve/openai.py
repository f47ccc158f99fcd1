"""The server: OpenAI's routes over one engine."""

import contextlib
import importlib.metadata
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from ropewalk.serve.asked import (
    BadRequest,
    Chat,
    Completion,
    Detokenize,
    Embeddings,
    Tokenize,
    refusal,
)
from ropewalk.serve.chat import chat_completions, message, read
from ropewalk.serve.completions import completions, unknown, warned
from ropewalk.serve.door import FAILED, Door, error
from ropewalk.serve.embeddings import embeddings
from ropewalk.serve.generation import Failed, Gone, Host
from ropewalk.serve.grammar import Busy
from ropewalk.serve.responses import Responses, responses
from ropewalk.serve.scheduler import QueueFull

PAGE = Path(__file__).with_name("page.html")


class Server:
    """The application, and what ends it."""

    def __init__(self, host: Host, keys: Sequence[str] = (), drain_s: float = 30.0):
        self.host, self.draining, self._drain_s = host, False, drain_s
        app = FastAPI(
            title="ropewalk",
            version=version(),
            lifespan=self._lifespan,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,  # by a Location made of the client's own Host
        )
        _errors(app)
        _routes(app, host)
        _states(app, host, self)
        self.app = Door(app, keys, self._allowed)

    def _allowed(self, path: str) -> bool:
        return not self.draining or path in ("/health", "/ready", "/metrics")

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.host.service.start()
        yield
        await run_in_threadpool(self.host.service.stop)

    async def drain(self) -> None:
        """Takes nothing more, and waits for what is being answered; asked again, it ends that."""
        wait, self.draining = 0.0 if self.draining else self._drain_s, True
        await self.host.service.drain(wait)


def version() -> str:
    """Of the installed package."""
    return importlib.metadata.version("ropewalk")


def _errors(app: FastAPI) -> None:
    def told(status: int, message: str, param=None, code=None, **headers: str) -> Response:
        return JSONResponse(error(status, message, param, code), status, headers)

    @app.exception_handler(BadRequest)
    async def bad(request: Request, wrong: BadRequest) -> Response:
        return told(
            404 if wrong.code == "model_not_found" else 400, str(wrong), wrong.param, wrong.code
        )

    @app.exception_handler(QueueFull)
    async def full(request: Request, wrong: QueueFull) -> Response:
        return told(429, str(wrong), **{"retry-after": "1"})

    @app.exception_handler(Busy)
    async def busy(request: Request, wrong: Busy) -> Response:
        return told(503, str(wrong), **{"retry-after": "1"})

    @app.exception_handler(Failed)
    async def failed(request: Request, wrong: Failed) -> Response:
        return told(500, str(wrong))

    @app.exception_handler(Gone)
    async def gone(request: Request, wrong: Gone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def http(request: Request, wrong: HTTPException) -> Response:
        headers = {k: v for k, v in (wrong.headers or {}).items() if k.lower() == "allow"}
        return told(wrong.status_code, str(wrong.detail), **headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, wrong: RequestValidationError) -> Response:
        refused = refusal(wrong.errors(), wrong.body)
        return told(400, str(refused), refused.param)

    # Starlette raises it once more, for the door to log.
    @app.exception_handler(Exception)
    async def unforeseen(request: Request, wrong: Exception) -> Response:
        return told(500, FAILED)


def _states(app: FastAPI, host: Host, server: Server) -> None:
    """What is told of the server itself."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(await run_in_threadpool(PAGE.read_text, "utf-8"))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken."""
        if server.draining:
            return JSONResponse(error(503, "the server is shutting down"), 503)
        if not host.service.alive:
            return JSONResponse(error(503, "the engine has no room for a new state"), 503)
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def version_() -> dict[str, str]:
        return {"version": version()}

    @app.get("/metrics")
    async def metrics() -> Response:
        """In Prometheus' format."""
        return Response(host.metrics.text(), media_type="text/plain; version=0.0.4")


def _routes(app: FastAPI, host: Host) -> None:
    """What is asked of the model."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(host)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        host.check_model(name)
        return _model(host)

    @app.post("/v1/completions")
    async def complete(asked: Completion, request: Request) -> Response:
        return await completions(host, asked, request)

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat, request: Request) -> Response:
        return await chat_completions(host, asked, request)

    @app.post("/v1/responses")
    async def respond(asked: Responses, request: Request) -> Response:
        return await responses(host, asked, request)

    @app.post("/v1/embeddings")
    async def embed(asked: Embeddings, request: Request) -> Response:
        return await embeddings(host, asked, request)

    @app.post("/tokenize")
    async def tokenize(asked: Tokenize, response: Response) -> dict[str, Any]:
        host.check_model(asked.model)
        if asked.prompt is not None:
            ids = await host.encode(host.fits(asked.prompt, "prompt"), "prompt")
        else:
            messages = [message(one, host.tokenizer.chat_template) for one in asked.messages or ()]
            _, ids = await read(host, messages, asked.add_generation_prompt, {})
        response.headers.update(warned(unknown(asked.unknown)))
        return {"count": len(ids), "max_model_len": host.length, "tokens": ids}

    @app.post("/detokenize")
    async def detokenize(asked: Detokenize, response: Response) -> dict[str, Any]:
        host.check_model(asked.model)
        response.headers.update(warned(unknown(asked.unknown)))
        ids = host.known(asked.tokens, "tokens")
        return {"prompt": await run_in_threadpool(host.tokenizer.decode, ids)}


def _model(host: Host) -> dict[str, Any]:
    return {
        "id": host.name,
        "object": "model",
        "created": host.created,
        "owned_by": "ropewalk",
        "max_model_len": host.length,
    }
