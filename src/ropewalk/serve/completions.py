"""`/v1/completions`: plain text after plain text."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ropewalk.core.log import log
from ropewalk.serve.asked import Completion
from ropewalk.serve.door import FAILED, error
from ropewalk.serve.generation import Answer, Failed, Generation, Host, attended
from ropewalk.serve.service import Token
from ropewalk.serve.text import Scores

# OpenAI's, where nothing is said.
_NEW = 16
# As many as the buffers of proxies hold.
_NOTES = 16


async def completions(host: Host, asked: Completion, request: Request) -> Response:
    """The answers, whole or as a stream. Raises BadRequest."""
    host.check_model(asked.model)
    prompts = await host.prompts(asked.prompt, "prompt")
    wanted = _NEW if asked.max_tokens is None else max(asked.max_tokens, 1)
    rooms = [host.room(prompt, wanted, "max_tokens") for prompt in prompts]
    ranked, scored = bool(asked.logprobs), asked.logprobs is not None and bool(asked.echo)
    matcher = await host.formatted(asked.response_format)
    jobs = host.jobs(asked, prompts, [room for room, _ in rooms], matcher, ranked, scored)
    notes = [*dict.fromkeys(note for _, note in rooms if note)]
    more = [f"{len(notes) - _NOTES} more clamped"] if len(notes) > _NOTES else []
    headers = warned([*notes[:_NOTES], *more, *unknown(asked.unknown)])
    follows = matcher is None  # what has a format begins a text of its own
    answers = host.answers(asked, jobs, follows=follows)
    whole = _Whole(host, asked, Generation(host, jobs, answers), follows)
    if asked.stream:
        return streaming(request, whole.stream(), headers)
    return JSONResponse(await attended(request, whole.body()), headers=headers)


class _Whole:
    """The shapes of the answers."""

    def __init__(self, host: Host, asked: Completion, generation: Generation, follows: bool):
        self.host, self.asked, self.generation = host, asked, generation
        follows = follows and not asked.echo
        self.scores = [
            Scores(host.tokenizer, asked.logprobs or 0, follows) for _ in generation.answers
        ]
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": host.name,
        }
        # With max_tokens 0 nothing is told of the one token that is always written.
        self.silent = asked.max_tokens == 0

    async def body(self) -> dict[str, Any]:
        """Of an answer that is told at once."""
        try:
            answers = await self.generation.all()
        finally:
            self.generation.close()
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """Chunks, as text comes."""
        begun: set[int] = set()
        try:
            async for step in self.generation.steps():
                first = step.index not in begun
                text = "" if self.silent else step.text
                echo = self._echo(step.index) if first else ""
                if not (text or echo or step.tokens or step.reason):
                    continue
                begun.add(step.index)
                logprobs = self._logprobs(step.index, step.tokens, first)
                yield self._chunk(step.index, echo + text, logprobs, step.reason)
            if self.asked.stream_options and self.asked.stream_options.include_usage:
                yield {**self.head, "choices": [], "usage": self._usage()}
        finally:
            self.generation.close()

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        text = self._echo(index) + ("" if self.silent else answer.text)
        logprobs = self._logprobs(index, answer.tokens, True)
        return self._chunk(index, text, logprobs, answer.reason)["choices"][0]

    def _logprobs(self, index: int, tokens: list[Token], first: bool) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        read = self._read(index) if first else []
        tokens = [*read, *(() if self.silent else tokens)]
        return self.scores[index].told(tokens, int(bool(read)))

    def _chunk(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        reason = "length" if self.silent and reason else reason
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self.head, "choices": [choice]}

    def _read(self, index: int) -> list[Token]:
        """The prompt's tokens where they are told; of several answers the first has them."""
        n = self.asked.n or 1
        first = index // n * n
        return self.generation.answers[first].prompt if self.asked.echo else []

    def _echo(self, index: int) -> str:
        if not self.asked.echo:
            return ""
        prompt = self.asked.prompt
        if isinstance(prompt, str):
            return prompt
        one = prompt[index // (self.asked.n or 1)] if prompt else ""
        if isinstance(one, str):
            return one
        return self.host.tokenizer.decode(self.generation.jobs[index].prompt)

    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage()
        if self.silent:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage


def streaming(
    request: Request, chunks: AsyncIterator[dict[str, Any]], headers: dict[str, str]
) -> Response:
    """Server-sent events of some chunks, and the end that clients look for, whatever happens."""

    async def lines() -> AsyncIterator[str]:
        chunk: dict[str, Any] = {}
        try:
            async for chunk in chunks:
                yield _event(chunk)
        except Exception as wrong:
            if not isinstance(wrong, Failed):
                log.exception("the stream of request %s failed", request.state.request_id)
            message = str(wrong) if isinstance(wrong, Failed) else FAILED
            yield _event(_failure(message, chunk.get("sequence_number")))
        if "sequence_number" not in chunk:  # events with names say themselves which is the last
            yield "data: [DONE]\n\n"

    more = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers={**headers, **more})


def _event(chunk: dict[str, Any]) -> str:
    name = f"event: {chunk['type']}\n" if "sequence_number" in chunk else ""
    return f"{name}data: {json.dumps(chunk, ensure_ascii=False, allow_nan=False)}\n\n"


def _failure(message: str, last: int | None) -> dict[str, Any]:
    """The last chunk of a stream that failed; `last` is the number of the event before it."""
    told = error(500, message)
    if last is None:
        return told
    told = told["error"]
    return {**told, "type": "error", "code": told["type"], "sequence_number": last + 1}


def warned(notes: list[str]) -> dict[str, str]:
    """Headers that tell what was not done as it was asked."""
    marks = str.maketrans({'"': "'", "\\": "/"})
    clean = [note.encode("ascii", "replace").decode().translate(marks) for note in notes]
    return {"warning": ", ".join(f'299 ropewalk "{note}"' for note in clean)} if notes else {}


def unknown(names: list[str]) -> list[str]:
    """A note where a request has fields that change nothing."""
    shown = [name[:40] for name in names[:8] if name.isprintable()]
    return [f"fields that change nothing: {' '.join(shown)}"] if names else []
