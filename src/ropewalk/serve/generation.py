"""One request's answers on their way: jobs in, text and tokens out, and nothing left behind when
the client goes."""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from ropewalk.core.errors import UserError
from ropewalk.serve.asked import BadRequest, ResponseFormat, Sampled
from ropewalk.serve.grammar import Busy, Grammars, Matcher, Regex, Schema, Spec
from ropewalk.serve.metrics import Metrics
from ropewalk.serve.service import Ended, Event, Job, Pooled, Read, Service, Token
from ropewalk.serve.text import Writer, spelled
from ropewalk.text.interface import Tokenizer


class Failed(Exception):
    """A request that the engine ended."""


class Gone(Exception):
    """Nobody waits for the answer any more."""


@dataclasses.dataclass
class Host:
    """What all routes share."""

    name: str
    """of the model, as requests say it"""
    tokenizer: Tokenizer
    service: Service
    grammars: Grammars | None
    """none without a token that ends an answer"""
    metrics: Metrics
    created: int
    """seconds since 1970"""

    def __post_init__(self) -> None:
        # Errors name the tokenizer, which till now is called by its path.
        self.tokenizer.name = self.name
        words = self.tokenizer.vocabulary
        self._widest = max(map(len, (*words.pieces, *words.specials.values())))

    @property
    def length(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.service.engine.sizes.length

    @property
    def vocab(self) -> int:
        """How many token ids the model has."""
        return self.service.engine.vocab

    def check_model(self, name: str | None) -> None:
        """Raises BadRequest for another model than the one that is served."""
        if name not in (None, self.name):
            raise BadRequest(
                f"model {name!r:.80} is not served here; this server has {self.name!r}: name it, "
                "or start another server for the other one",
                "model",
                "model_not_found",
            )

    def fits(self, text: str, param: str) -> str:
        """The text. Raises BadRequest where it is too long whatever its tokens are, as it would
        take seconds to tell which they are."""
        most = self.length * self._widest
        if len(text) > most:
            raise BadRequest(
                f"{param} has {len(text)} characters; the server takes {self.length} tokens of "
                f"{self._widest} at most: shorten it",
                param,
                "context_length_exceeded",
            )
        return text

    def checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """A prompt's ids. Raises BadRequest where there are none, too many, or unknown ones."""
        if not ids:
            raise BadRequest(f"{param} has no tokens; give at least one", param)
        if len(ids) >= self.length:
            raise BadRequest(
                f"{param} has {len(ids)} tokens; the server takes {self.length} with the answer: "
                f"shorten it to {self.length - 1} at most",
                param,
                "context_length_exceeded",
            )
        return self.known(ids, param)

    def known(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """Some ids. Raises BadRequest for one that the model lacks."""
        outside = [token for token in ids if token >= self.vocab]
        if outside:
            raise BadRequest(
                f"{param} has token {outside[0]}; the model's vocabulary is 0 to {self.vocab - 1}",
                param,
            )
        return tuple(ids)

    async def encode(self, text: str, param: str) -> list[int]:
        """A prompt's ids, with BOS where the tokenizer puts it. Raises BadRequest."""
        try:
            ids = await run_in_threadpool(self.tokenizer.encode_prompt, _utf8(text, param))
        except UserError as error:
            raise BadRequest(f"{param}: {error}", param) from None
        bos = self.tokenizer.bos_id
        return ids or ([] if bos is None else [bos])

    async def prompts(self, given: Any, param: str) -> list[tuple[int, ...]]:
        """The ids of one text, one list of ids, or several of either. Raises BadRequest."""
        if not given and not isinstance(given, str):
            raise BadRequest(f"{param} has no tokens; give at least one", param)
        one = isinstance(given, str) or isinstance(given[0], int)
        many = [given] if one else given
        texts = [each for each in many if isinstance(each, str)]
        for text in texts:
            self.fits(text, param)
        encoded = iter([await self.encode(text, param) for text in texts])
        ids = [next(encoded) if isinstance(each, str) else each for each in many]
        return [self.checked(each, param) for each in ids]

    async def formatted(self, wanted: ResponseFormat | None, thinking: str = "") -> Matcher | None:
        """What holds one answer to a format; `thinking` as of `Grammars.compile`. Raises
        BadRequest."""
        if wanted is None or wanted.type == "text":
            return None
        if wanted.json_schema is not None and wanted.type == "json_schema":
            spec: Spec = Schema(wanted.json_schema.schema_)
        elif wanted.regex is not None and wanted.type == "regex":
            spec = Regex(wanted.regex)
        else:
            spec = Schema({"type": "object"})
        return await self.matcher(spec, "response_format", thinking)

    async def matcher(self, spec: Spec, param: str, thinking: str = "") -> Matcher:
        """What constrains one answer. Raises BadRequest where it cannot be compiled, and Busy."""
        if self.grammars is None:
            raise BadRequest(
                f"{param}: {self.name} has no token that ends an answer, so that none can be held "
                "to a format: leave it out",
                param,
            )
        try:
            return await run_in_threadpool(self.grammars.compile, spec, thinking)
        except Busy:
            raise
        except UserError as error:
            raise BadRequest(f"{param}: {error}", param) from None

    def room(self, prompt: Sequence[int], asked: int | None, field: str) -> tuple[int, str | None]:
        """How many tokens an answer may have, and a note where that is less than `field` asked."""
        room = self.length - len(prompt)
        if asked is None or asked <= room:
            return (room if asked is None else asked), None
        return (
            room,
            f"{field} {asked} clamped to {room}, what the prompt leaves of {self.length}",
        )

    def jobs(
        self,
        asked: Sampled,
        prompts: Sequence[tuple[int, ...]],
        limits: Sequence[int],
        matcher: Matcher | None = None,
        ranked: bool = False,
        scored: bool = False,
    ) -> list[Job]:
        """One job an answer, `n` for every prompt, that share a queue. Raises BadRequest for more
        than ever may wait."""
        count, most = len(prompts) * (asked.n or 1), self.service.limits.queue
        if count > most:
            raise BadRequest(
                f"{count} answers are asked for at once (prompts: {len(prompts)}, n: {asked.n or 1}"
                f"); the server holds {most} at most: send several requests",
                "n" if len(prompts) == 1 else "prompt",
            )
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        ends, jobs = self.tokenizer.eos_ids, []
        drawn = secrets.randbits(32)
        for prompt, limit in zip(prompts, limits, strict=True):
            for choice in range(asked.n or 1):
                seed = (asked.seed if asked.seed is not None else drawn) + choice
                jobs.append(
                    Job(
                        prompt,
                        asked.settings(limit, self.vocab, ends, seed, ranked),
                        len(jobs),
                        events,
                        asked.priority or 0,
                        (asked.cache_salt or "").encode(),
                        matcher.copy() if matcher else None,
                        scored and choice == 0,
                    )
                )
        return jobs

    def answers(
        self,
        asked: Sampled,
        jobs: Sequence[Job],
        markers: Iterable[str] = (),
        follows: bool = False,
    ) -> "list[Answer]":
        """One empty answer a job; `markers` are special tokens that are written out, `follows` as
        of StreamDecoder."""
        ends, written = asked.ends(self.tokenizer.eos_ids), spelled(self.tokenizer, markers)
        stops = asked.stops()
        return [Answer(Writer(self.tokenizer, stops, ends, written, follows)) for _ in jobs]


@dataclasses.dataclass
class Answer:
    """What one job has given so far."""

    writer: Writer
    pieces: list[str] = dataclasses.field(default_factory=list)
    tokens: list[Token] = dataclasses.field(default_factory=list)
    prompt: list[Token] = dataclasses.field(default_factory=list)
    """the prompt's, where they were scored"""
    reason: str | None = None

    @property
    def text(self) -> str:
        """All that was written."""
        return "".join(self.pieces)


@dataclasses.dataclass
class Step:
    """What came of one answer: tokens, the text that each made certain, text that was held back to
    the end, and the reason if it ended."""

    index: int
    tokens: list[Token]
    pieces: list[str]
    rest: str
    reason: str | None

    @property
    def text(self) -> str:
        """All that is certain now."""
        return "".join(self.pieces) + self.rest


class Generation:
    """The answers of one request, while they are written."""

    def __init__(self, host: Host, jobs: list[Job], answers: list[Answer]):
        self.host, self._events = host, jobs[0].events
        self.jobs: list[Job] = []
        self.answers: list[Answer] = []
        host.service.submit(jobs)
        self.jobs, self.answers = jobs, answers

    def __del__(self) -> None:
        # A client may leave before anybody asks for the first step.
        self.close()

    def close(self) -> None:
        """Ends what is still being written."""
        open_ = [j for j, a in zip(self.jobs, self.answers, strict=True) if a.reason is None]
        self.host.service.cancel(open_)

    def stop(self, index: int) -> None:
        """Ends one answer where it stands, if it has not ended."""
        if self.answers[index].reason is None:
            self.answers[index].reason = "stop"
            self.host.service.cancel([self.jobs[index]])

    async def steps(self) -> AsyncIterator[Step]:
        """Everything, as it comes. Raises Failed."""
        while any(answer.reason is None for answer in self.answers):
            index, event = await self._events.get()
            answer = self.answers[index]
            if answer.reason is not None:
                continue
            step = self._step(index, answer, event)
            if step is not None:
                yield step

    def _step(self, index: int, answer: Answer, event: Event) -> Step | None:
        tokens: list[Token] = []
        pieces: list[str] = []
        rest = ""
        match event:
            case Read(read):
                answer.prompt = read
                return None
            case Ended("error" | "cancelled", message):
                raise Failed(message or "the request was cancelled")
            case Ended(reason):
                rest = answer.writer.finish()
                answer.reason = "stop" if answer.writer.stopped else reason
            case list(written):
                for token in written:
                    pieces.append(answer.writer.feed(token.id))
                    tokens.append(token)
                    if answer.writer.stopped:
                        break
                answer.tokens += tokens
                if answer.writer.stopped:
                    self.stop(index)
            case Pooled():
                return None
        answer.pieces += [*pieces, rest]
        return Step(index, tokens, pieces, rest, answer.reason)

    async def all(self) -> list[Answer]:
        """The answers when they are whole. Raises Failed."""
        async for _ in self.steps():
            pass
        return self.answers

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts and answers; a prompt with several answers counts once."""
        prompts = {id(job.prompt): job for job in reversed(self.jobs)}
        read = sum(len(job.prompt) for job in prompts.values())
        written = sum(len(answer.tokens) for answer in self.answers)
        cached = sum(job.sequence.cached for job in prompts.values())
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


async def attended[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, given up when the client leaves. Raises Gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Gone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _utf8(text: str, param: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest(f"{param} is no text: it has half a character", param) from None
    return text
