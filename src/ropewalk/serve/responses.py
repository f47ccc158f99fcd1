"""`/v1/responses`: what chat completions answer, as typed items and events. Nothing is stored, so
a conversation comes whole with each request."""

import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Annotated, Any, Literal

import pydantic
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from ropewalk.serve import reasoning
from ropewalk.serve.asked import (
    MOST_MESSAGES,
    MOST_TOOLS,
    Asked,
    BadRequest,
    Chat,
    Plain,
    Said,
    Sampled,
    Text,
    Word,
    few,
    refusal,
)
from ropewalk.serve.chat import Conversation, begin, prepared
from ropewalk.serve.completions import streaming, unknown, warned
from ropewalk.serve.deltas import Arguments, Call, Content, Delta, Reasoning
from ropewalk.serve.generation import Failed, Generation, Host, Step, attended
from ropewalk.serve.service import Token
from ropewalk.serve.slots import MOST_RANKED
from ropewalk.serve.text import chat_logprobs

type Event = dict[str, Any]

_LOGPROBS = "message.output_text.logprobs"
_STORED = "nothing is stored here: send the whole conversation as input"
_REFUSED = {
    "previous_response_id": _STORED,
    "conversation": _STORED,
    "prompt": "no templates are kept here: send their text as input and instructions",
    "background": "a response is told while it is awaited: leave it out, or stream",
}
# Fields of a chat completion, by which its refusals speak, as they are called here.
_NAMES = {
    "messages": "input", "response_format": "text.format", "reasoning_effort": "reasoning.effort",
}  # fmt: skip
_NEEDED = {
    "message": ("role", "content"), "reasoning": (),
    "function_call": ("call_id", "name", "arguments"), "function_call_output": ("output",),
}  # fmt: skip
_KINDS = {
    Content: ("message", "output_text"), Reasoning: ("reasoning", "reasoning_text"),
    Arguments: ("function_call", "function_call_arguments"),
}  # fmt: skip
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class Piece(Said[Literal["input_text", "output_text", "reasoning_text", "refusal"]]):
    """A piece of a text; nothing but text can be read."""

    annotations: Any = None  # which we write, and nobody reads
    logprobs: Any = None


Name = Annotated[str, Field(max_length=64)]
Pieces = Text | Annotated[list[Piece], Field(max_length=256, fail_fast=True)]


class Item(Asked):
    """A message, a call, what came of a call, or what was thought."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Pieces | None = None
    call_id: Word | None = None
    name: Name | None = None
    arguments: Text | None = None
    output: Pieces | None = None
    id: Any = None  # which we write, and nobody reads
    status: Any = None
    summary: Any = None

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "Item":
        for name in _NEEDED[self.type]:
            if getattr(self, name) is None:
                raise BadRequest(f"{name}: is missing", name)
        for name in ("content", "output"):
            told = getattr(self, name)
            pieces = told if isinstance(told, list) and self.role != "assistant" else ()
            if any(piece.type == "refusal" for piece in pieces):
                raise BadRequest(f"{name}: has a refusal, which only an assistant's may", name)
        return self

    @property
    def text(self) -> str:
        """What it says, its pieces one after the other."""
        told = self.content or self.output or ""
        return told if isinstance(told, str) else "".join(map(str, told))


class FunctionTool(Asked):
    """A function that may be called; a tool that a server would run itself is refused."""

    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: Plain | None = None
    strict: bool | None = None


class ToolChoice(Asked):
    """The function that is to be called."""

    type: Literal["function"]
    name: Name


class Format(Asked):
    """What the text looks like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Word | None = None
    description: Text | None = None
    schema_: Plain | None = Field(None, alias="schema")
    strict: bool | None = None

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "Format":
        for name, given in {"name": self.name, "schema": self.schema_}.items():
            if self.type == "json_schema" and given is None:
                raise BadRequest(f"{name}: is missing", name)
        return self


class TextConfig(Asked):
    """How text is written."""

    format: Format | None = None


class Effort(Asked):
    """How much is to be thought."""

    effort: Word | None = None


class Responses(Sampled):
    """Body of `/v1/responses`."""

    input: (
        Text | Annotated[list[Item], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    )
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Effort | None = None
    include: Annotated[list[Word], Field(max_length=16, fail_fast=True)] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_RANKED)
    metadata: (
        Annotated[dict[Name, Annotated[str, Field(max_length=512)]], few(16), Field(max_length=16)]
        | None
    ) = None
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def format(self) -> Format:
        """What the text looks like."""
        return (self.text and self.text.format) or Format.model_validate({})

    @property
    def logprobs(self) -> bool:
        """Whether log-probabilities are told."""
        return _LOGPROBS in (self.include or ())


async def responses(host: Host, asked: Responses, request: Request) -> Response:
    """The response, whole or as events. Raises BadRequest."""
    host.check_model(asked.model)
    for name, why in _REFUSED.items():
        if (asked.model_extra or {}).get(name):
            raise BadRequest(f"{name}: {why}", name)
    if (asked.n or 1) > 1:
        raise BadRequest("n: a response is one answer; send the request again for more", "n")
    try:
        chat = _chat(asked)
        conversation = await prepared(host, chat)
    except BadRequest as wrong:
        old = (wrong.param or "").partition(".")[0]
        new = _NAMES.get(old, old)
        raise BadRequest(str(wrong).replace(old, new, 1), new, wrong.code) from None
    room, note = host.room(conversation.prompt, asked.max_output_tokens, "max_output_tokens")
    notes = [note] if note else []
    for one in conversation.notes:
        name = one.partition(" ")[0]
        notes.append(one.replace(name, _NAMES[name]))
    headers = warned([*notes, *unknown(asked.unknown)])
    whole = _Whole(host, asked, conversation, begin(host, chat, conversation, room))
    if asked.stream:
        return streaming(request, whole.stream(), headers)
    return JSONResponse(await attended(request, whole.body()), headers=headers)


def _chat(asked: Responses) -> Chat:
    """The chat completion that answers this. Raises BadRequest, by the names of its fields."""
    choice, form = asked.tool_choice, asked.format
    named = isinstance(choice, ToolChoice) and {"name": choice.name}
    asks = {
        **asked.model_dump(include=set(Sampled.model_fields)),
        "messages": _messages(asked),
        "logprobs": asked.logprobs,
        "top_logprobs": asked.top_logprobs if asked.logprobs else None,
        "tools": [{"type": "function", "function": tool} for tool in _tools(asked)],
        "tool_choice": {"type": "function", "function": named} if named else choice,
        "parallel_tool_calls": asked.parallel_tool_calls,
        "response_format": {"type": form.type, "json_schema": {"schema": form.schema_ or {}}},
        "reasoning_effort": asked.reasoning and asked.reasoning.effort,
        "chat_template_kwargs": asked.chat_template_kwargs,
    }
    try:
        return Chat.model_validate(asks)
    except pydantic.ValidationError as wrong:
        errors = [{**error, "loc": ("body", *error["loc"])} for error in wrong.errors()]
        raise refusal(errors, asks) from None


def _tools(asked: Responses) -> list[dict[str, Any]]:
    known = {"name", "description", "parameters", "strict"}
    return [tool.model_dump(include=known) for tool in asked.tools or ()]


def _messages(asked: Responses) -> list[dict[str, Any]]:
    """The input as messages: calls stand in the message of their turn, and so does thinking."""
    told: list[dict[str, Any]] = []
    if asked.instructions:
        told.append({"role": "system", "content": asked.instructions})
    given, thought = asked.input, ""
    items = [Item(role="user", content=given)] if isinstance(given, str) else given
    for item in items:
        if item.type == "reasoning":
            thought += item.text
            continue
        if item.type == "message":
            told.append({"role": item.role, "content": item.text})
        elif item.type == "function_call_output":
            told.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text})
        else:
            if not told or told[-1]["role"] != "assistant" or thought:
                told.append({"role": "assistant"})
            called = {"name": item.name, "arguments": item.arguments}
            told[-1].setdefault("tool_calls", []).append({"id": item.call_id, "function": called})
        if thought and told[-1]["role"] == "assistant":
            told[-1]["reasoning_content"] = thought
        thought = ""
    return told


class _Items:
    """Output items as pieces of an answer make them, and the events that tell so."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] = {}
        self._texts: list[str] = []
        self._logprobs: list[Any] = []

    def add(self, delta: Delta, logprobs: list[Any]) -> Iterator[Event]:
        """One more piece, with the log-probabilities of its tokens."""
        if isinstance(delta, Call):
            yield from self._begin("function_call", call_id=delta.id, name=delta.name)
            return
        kind, name = _KINDS[type(delta)]
        if self._open.get("type") != kind:
            yield from self._begin(kind)
        self._texts.append(delta.text)
        self._logprobs += logprobs
        yield self._event(f"{name}.delta", logprobs, delta=delta.text)

    def close(self, status: str = "completed") -> Iterator[Event]:
        """Ends the last item, if it has not ended."""
        if not self._open:
            return
        item = self._item(status)
        if item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("function_call_arguments.done", **told)
        else:
            (part,) = item["content"]
            yield self._event(f"{part['type']}.done", self._logprobs, text=part["text"])
            yield self._event("content_part.done", part=part)
        index = len(self.done)
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
        self.done.append(item)
        self._open = {}

    def _begin(self, kind: str, **more: str) -> Iterator[Event]:
        yield from self.close()
        self._open = {"id": f"{_PREFIXES[kind]}_{secrets.token_hex(12)}", "type": kind, **more}
        self._texts, self._logprobs = [], []
        item, index = self._item("in_progress"), len(self.done)
        parts = item.get("content", [])
        empty = {**item, "content": []} if parts else item
        yield {"type": "response.output_item.added", "output_index": index, "item": empty}
        for part in parts:
            yield self._event("content_part.added", part=part)

    def _item(self, status: str) -> dict[str, Any]:
        item, text = {**self._open, "status": status}, "".join(self._texts)
        if item["type"] == "function_call":
            return {**item, "arguments": text}
        if item["type"] == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": text}
            return {**item, "summary": [], "content": [part]}
        part = {"type": "output_text", "text": text, "annotations": []}
        return {**item, "role": "assistant", "content": [{**part, "logprobs": self._logprobs}]}

    def _event(self, kind: str, logprobs: list[Any] | None = None, **more: Any) -> Event:
        at = {"item_id": self._open["id"], "output_index": len(self.done)}
        if self._open["type"] != "function_call":
            at["content_index"] = 0
        if kind.startswith("output_text"):
            at["logprobs"] = logprobs
        return {"type": f"response.{kind}", **at, **more}


class _Whole:
    """The response, and the events that tell of it."""

    def __init__(
        self, host: Host, asked: Responses, conversation: Conversation, generation: Generation
    ):
        self.host, self.asked, self.generation = host, asked, generation
        self.id, self.created = f"resp_{secrets.token_hex(24)}", int(time.time())
        self.items, self.parser = _Items(), conversation.parser()
        # Text is taken token by token, so that each is known as thought, answer or call.
        self.ends = asked.ends(host.tokenizer.eos_ids)
        self.thought, self.answered = reasoning.Count(conversation.thinking), False
        self.held: list[tuple[Token, str]] = []

    async def body(self) -> dict[str, Any]:
        """The response when it is whole. Raises Failed."""
        last: Event = {}
        async for event in self.stream():
            last = event.get("response", last)
        if last["error"]:
            raise Failed(last["error"]["message"])
        return last

    async def stream(self) -> AsyncIterator[Event]:
        """The events, numbered."""
        number = 0
        try:
            async for event in self._events():
                yield {**event, "sequence_number": number}
                number += 1
        finally:
            self.generation.close()

    async def _events(self) -> AsyncIterator[Event]:
        for kind in ("created", "in_progress"):
            yield {"type": f"response.{kind}", "response": self._response("in_progress")}
        status, more = "completed", {}
        try:
            async for step in self.generation.steps():
                for event in self._told(step):
                    yield event
                if step.reason == "length" and not self.parser.ended:
                    details = {"reason": "max_output_tokens"}
                    status, more = "incomplete", {"incomplete_details": details}
        except Failed as failed:
            error = {"code": "server_error", "message": str(failed)}
            status, more = "failed", {"error": error}
        empty = self.items.add(Content(""), [])  # where there is neither text nor call
        last = self.items.close("completed" if status == "completed" else "incomplete")
        for event in (*(empty if status == "completed" and not self.answered else ()), *last):
            yield event
        response = self._response(status, usage=self._usage(), **more)
        yield {"type": f"response.{status}", "response": response}

    def _told(self, step: Step) -> Iterator[Event]:
        for token, text in zip(step.tokens, step.pieces, strict=True):
            self.thought.add(text)
            if token.id not in self.ends:
                self.held.append((token, text))
            yield from self._written(self.parser.feed(text))
        if self.parser.ended:  # the only call that there may be
            self.generation.stop(step.index)
        if step.reason or self.parser.ended:
            rest = self.parser.feed(step.rest)
            yield from self._written([*rest, *self.parser.finish()])

    def _written(self, deltas: Iterable[Delta]) -> Iterator[Event]:
        for delta in deltas:
            self.answered |= not isinstance(delta, Reasoning)
            held, self.held = self.held, []
            tokens = _last(held, delta.text) if isinstance(delta, Content) else []
            tokens = tokens if self.asked.logprobs else []
            top = self.asked.top_logprobs or 0
            logprobs = chat_logprobs(self.host.tokenizer, tokens, top)["content"]
            yield from self.items.add(delta, logprobs)

    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.thought.tokens},
            "total_tokens": usage["total_tokens"],
        }

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        asked, choice, form = self.asked, self.asked.tool_choice, self.asked.format
        named = isinstance(choice, ToolChoice) and {"type": "function", "name": choice.name}
        shown = set(Format.model_fields) if form.type == "json_schema" else {"type"}
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "background": False, "error": None, "incomplete_details": None,
            "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {}, "model": self.host.name,
            "output": list(self.items.done),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None, "store": False,
            "reasoning": {"effort": asked.reasoning and asked.reasoning.effort, "summary": None},
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": form.model_dump(include=shown, by_alias=True)},
            "tool_choice": named or choice or "auto",
            "tools": [{"type": "function", **tool} for tool in _tools(asked)],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled", "usage": None, "user": asked.user, **more,
        }  # fmt: skip


def _last(held: list[tuple[Token, str]], text: str) -> list[Token]:
    """The tokens of this text, which are the last that came: without tags and blanks before it."""
    at, size = len(held), 0
    while at and (size < len(text) or not held[at - 1][1]):
        at -= 1
        size += len(held[at][1])
    return [token for token, _ in held[at:]]
