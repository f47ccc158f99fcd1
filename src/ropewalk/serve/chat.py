"""`/v1/chat/completions`: the next message of a conversation, with tool calls, reasoning, and
formats that it must keep to."""

import dataclasses
import functools
import json
import re
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from ropewalk.core.errors import UserError
from ropewalk.serve import deltas, grammar, reasoning, tool_choice, tools
from ropewalk.serve.asked import BadRequest, Chat, Message, NamedTool, ResponseFormat
from ropewalk.serve.completions import streaming, unknown, warned
from ropewalk.serve.generation import Generation, Host, Step, attended
from ropewalk.serve.text import chat_logprobs
from ropewalk.text import chat as templates
from ropewalk.text.interface import Tokenizer, checked

# What a template gets from us, which no request may give.
_RESERVED = {
    "messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token",
    "chat_template", "documents", "tokenizer",
}  # fmt: skip
# Goes before what a request spells like a special token; no text has it, says Unicode.
_MARK = "\ufdd0"


@dataclasses.dataclass
class Conversation:
    """A conversation made ready: its tokens, and how its answer is to be read."""

    prompt: tuple[int, ...]
    thinking: reasoning.Thinking | None
    form: tools.Format | None
    choice: tool_choice.Choice
    matcher: grammar.Matcher | None
    notes: list[str]
    """what is not done as it was asked"""

    def parser(self) -> tools.Parser:
        """For one answer."""
        single = not self.choice.parallel
        return tools.Parser(self.form, self.choice.functions, self.thinking, single)


async def chat_completions(host: Host, asked: Chat, request: Request) -> Response:
    """The answers, whole or as a stream. Raises BadRequest."""
    host.check_model(asked.model)
    conversation = await prepared(host, asked)
    wanted = asked.max_completion_tokens or asked.max_tokens
    field = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
    room, note = host.room(conversation.prompt, wanted, field)
    notes = [*([note] if note else []), *conversation.notes]
    headers = warned([*notes, *unknown(asked.unknown)])
    whole = _Whole(host, asked, begin(host, asked, conversation, room), conversation)
    if asked.stream:
        return streaming(request, whole.stream(), headers)
    return JSONResponse(await attended(request, whole.body()), headers=headers)


def begin(host: Host, asked: Chat, conversation: Conversation, room: int) -> Generation:
    """Begins to write. Raises BadRequest, and QueueFull."""
    ranked = bool(asked.logprobs and asked.top_logprobs)
    prompts = [conversation.prompt], [room], conversation.matcher, ranked
    jobs = host.jobs(asked, *prompts)
    markers = conversation.form.markers if conversation.form else ()
    thought = (conversation.thinking or reasoning.ThinkTags(False)).markers
    return Generation(host, jobs, host.answers(asked, jobs, (*markers, *thought)))


async def prepared(host: Host, asked: Chat) -> Conversation:
    """The conversation as its model reads it. Raises BadRequest."""
    extra: dict[str, Any] = dict(asked.chat_template_kwargs or {})
    taken = _RESERVED & extra.keys()
    if taken:
        raise BadRequest(
            f"chat_template_kwargs has {', '.join(sorted(taken))}, which the server gives itself",
            "chat_template_kwargs",
        )
    template = host.tokenizer.chat_template
    listed = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
    how = asked.tool_choice
    named = how.model_dump() if isinstance(how, NamedTool) else how
    try:
        choice = tool_choice.choose(listed, named, asked.parallel_tool_calls is not False)
    except UserError as error:
        raise BadRequest(f"tools: {error}", "tools") from None
    form = tools.detect(template) if choice.functions else None
    if choice.functions and form is None:
        raise BadRequest(
            "tools: the chat template of this model knows none of the ways to call them: leave "
            'tools out, or say tool_choice = "none"',
            "tools",
        )
    for tool in listed if form and form.described else ():
        tool["function"].setdefault("description", "")
    if choice.functions:
        extra["tools"] = listed
    notes: list[str] = []
    if asked.reasoning_effort and "reasoning_effort" in (template or ""):
        extra = {"reasoning_effort": asked.reasoning_effort, **extra}
    elif asked.reasoning_effort:
        notes.append("reasoning_effort changes nothing, as the model's chat template has none")
    messages = [message(one, template) for one in asked.messages]
    text, ids = await read(host, messages, True, extra)
    ids = host.checked(ids, "messages")
    thinking = reasoning.detect(template, text)
    matcher = await _matcher(host, asked.response_format, form, choice, thinking)
    if matcher is not None and choice.functions and not choice.forced:
        notes.append("response_format holds the whole answer, so that no tool is called")
    return Conversation(ids, thinking, form, choice, matcher, notes)


async def read(
    host: Host, messages: list[Any], begun: bool, extra: dict[str, Any]
) -> tuple[str, list[int]]:
    """A conversation as text and as ids. Raises BadRequest."""
    if reasoning.CHANNEL in (host.tokenizer.chat_template or ""):
        messages = _instructed(messages)
    render = functools.partial(templates.render, host.tokenizer, messages, begun, **extra)
    try:
        text = host.fits(checked(await run_in_threadpool(render)), "messages")
        return text, await run_in_threadpool(_ids, host.tokenizer, text, messages, begun, extra)
    except BadRequest:
        raise
    except UserError as error:
        raise BadRequest(f"messages: {error}", "messages") from None
    except RecursionError:
        raise BadRequest("messages: are nested too deeply", "messages") from None


def _ids(
    tokenizer: Tokenizer, text: str, messages: list[Any], begun: bool, extra: dict[str, Any]
) -> list[int]:
    """Special tokens are those that the template writes; what a request spells like one stays
    text, so that nobody forges a turn."""
    ids = {spelling: i for i, spelling in tokenizer.vocabulary.specials.items()}
    asked = json.dumps([messages, extra], ensure_ascii=False).replace(_MARK, "")
    if not any(spelling in asked for spelling in ids):
        return tokenizer.encode(text, allow_special=True)
    spellings = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
    special = re.compile(f"{_MARK}?(?:{spellings})")
    messages, extra = json.loads(special.sub(lambda found: _MARK + found[0], asked))
    text, read, plain, at = templates.render(tokenizer, messages, begun, **extra), [], "", 0
    for found in special.finditer(text):
        plain += text[at : found.start()]
        at = found.end()
        if found[0] in ids:
            read += [*tokenizer.encode(plain.replace(_MARK, "")), ids[found[0]]]
            plain = ""
        else:
            plain += found[0]
    return read + tokenizer.encode((plain + text[at:]).replace(_MARK, ""))


def message(one: Message, template: str | None) -> dict[str, Any]:
    """A message as templates read it: arguments of calls as objects where they are such, thoughts
    by the name that the template has for them, and a developer's as the system's where it knows
    none."""
    told = one.model_dump(exclude_none=True, exclude={"content"})
    if one.role == "developer" and "developer" not in (template or ""):
        told["role"] = "system"
    told["content"] = one.text
    if one.reasoning_content and "message.thinking" in (template or ""):
        told["thinking"] = one.reasoning_content
        if one.tool_calls:  # beside which gpt-oss's takes one of them
            told["thinking"] = "\n\n".join(filter(None, [one.reasoning_content, one.text]))
            told["content"] = ""
    for call in told.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return told


def _instructed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All instructions as one message at the beginning: gpt-oss's template drops all others."""
    told = [one for one in messages if one["role"] in ("system", "developer")]
    rest = [one for one in messages if one["role"] not in ("system", "developer")]
    joined = "\n\n".join(one["content"] for one in told)
    return [{**told[0], "content": joined}, *rest] if told else rest


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _matcher(
    host: Host,
    wanted: ResponseFormat | None,
    form: tools.Format | None,
    choice: tool_choice.Choice,
    thinking: reasoning.Thinking | None,
) -> grammar.Matcher | None:
    special = {text: i for i, text in host.tokenizer.vocabulary.specials.items()}
    if form is not None and choice.forced:
        text = tool_choice.grammar(form, choice, thinking, special)
        return await host.matcher(grammar.Lark(text), "tools")
    before = thinking.rule(special, content=True) if thinking else ""
    return await host.formatted(wanted, before)


class _Whole:
    """The shapes of the answers."""

    def __init__(self, host: Host, asked: Chat, generation: Generation, conversation: Conversation):
        self.host, self.asked, self.generation = host, asked, generation
        self.parsers = [conversation.parser() for _ in generation.jobs]
        self.thought = [reasoning.Count(conversation.thinking) for _ in generation.jobs]
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": host.name,
        }

    async def body(self) -> dict[str, Any]:
        """Of an answer that is told at once."""
        told: list[list[deltas.Delta]] = [[] for _ in self.parsers]
        try:
            async for step in self.generation.steps():
                told[step.index] += self._read(step)
        finally:
            self.generation.close()
        choices = [
            {
                "index": i,
                "message": {"refusal": None, **deltas.message(told[i])},
                "logprobs": self._logprobs(answer.tokens),
                "finish_reason": self._reason(i),
            }
            for i, answer in enumerate(self.generation.answers)
        ]
        body = {"object": "chat.completion", "choices": choices, "usage": self._usage()}
        return {**self.head, **body}

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """Chunks, as text comes."""
        try:
            for i in range(len(self.parsers)):
                yield self._chunk(i, {"role": "assistant", "content": ""})
            async for step in self.generation.steps():
                for chunk in self._told(step):
                    yield chunk
            options = self.asked.stream_options
            if options and options.include_usage:
                yield {**self._chunk(0, {}), "choices": [], "usage": self._usage()}
        finally:
            self.generation.close()

    def _read(self, step: Step) -> list[deltas.Delta]:
        """What a step adds to its answer, which ends behind the only call that there may be."""
        parser, i = self.parsers[step.index], step.index
        for text in step.pieces:
            self.thought[i].add(text)
        read = parser.feed(step.text) if step.text else []
        if parser.ended:
            self.generation.stop(i)
        return read + (parser.finish() if self._reason(i) else [])

    def _told(self, step: Step) -> list[dict[str, Any]]:
        i = step.index
        chunks = [self._chunk(i, deltas.openai(delta)) for delta in self._read(step)]
        if self.asked.logprobs and step.tokens:
            chunks = chunks or [self._chunk(i, {"content": ""})]
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(step.tokens)
        if reason := self._reason(i):
            chunks.append(self._chunk(i, {}, reason))
        return chunks

    def _reason(self, index: int) -> str | None:
        """Why an answer ended, if it has."""
        reason, parser = self.generation.answers[index].reason, self.parsers[index]
        return "tool_calls" if parser.ended or (reason == "stop" and parser.calls) else reason

    def _usage(self) -> dict[str, Any]:
        details = {"reasoning_tokens": sum(count.tokens for count in self.thought)}
        return {**self.generation.usage(), "completion_tokens_details": details}

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None):
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: list[Any]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        ends = self.asked.ends(self.host.tokenizer.eos_ids)
        tokens = [token for token in tokens if token.id not in ends]  # it is no content
        return chat_logprobs(self.host.tokenizer, tokens, self.asked.top_logprobs or 0)
