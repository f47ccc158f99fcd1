"""What an answer is made of, as the deltas of a chat completion; and what a model thinks
(`<think>...</think>`) split from what it answers, as the text comes.

Knows no tokenizer: a server spells `MARKERS` out where they are special tokens.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

OPEN, CLOSE = MARKERS = ("<think>", "</think>")
BLANKS = " \t\r\n"


@dataclass(frozen=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what was thought before the answer."""

    text: str


@dataclass(frozen=True)
class Call:
    """The begin of a tool call."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the JSON that is the arguments of a call, as the model wrote it."""

    index: int
    text: str


Delta = Content | Reasoning | Call | Arguments


def openai(delta: Delta) -> dict[str, Any]:
    """The `delta` of a chat completion's chunk."""
    match delta:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case Call(index, id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas with neighbouring pieces of one text in one."""
    whole: list[Delta] = []
    for _, group in groupby(deltas, lambda d: (type(d), getattr(d, "index", None))):
        first, *more = group
        if not isinstance(first, Call):
            text = "".join([first.text, *(d.text for d in more if not isinstance(d, Call))])
            first = replace(first, text=text)
        whole.append(first)
    return whole


def message(deltas: Iterable[Delta]) -> dict[str, Any]:
    """The whole answer as the `message` of a chat completion."""
    texts: dict[type, str] = {Content: "", Reasoning: ""}
    calls: list[dict[str, Any]] = []
    for delta in merged(deltas):
        match delta:
            case Call(_, id, name):
                function = {"name": name, "arguments": ""}
                calls.append({"id": id, "type": "function", "function": function})
            case Arguments(index, text):
                calls[index]["function"]["arguments"] += text
            case _:
                texts[type(delta)] += delta.text
    content = texts[Content] or (None if calls else "")
    answer: dict[str, Any] = {"role": "assistant", "content": content}
    if texts[Reasoning]:
        answer["reasoning_content"] = texts[Reasoning]
    if calls:
        answer["tool_calls"] = calls
    return answer


def detect(chat_template: str | None, prompt: str) -> bool | None:
    """What `Splitter` is to be told of a conversation: None where the template knows no thinking,
    else whether its prompt ends inside of it."""
    if chat_template is None or CLOSE not in chat_template:
        return None
    return prompt.rstrip(BLANKS).endswith(OPEN)


def spelling(marker: str, tokens: Mapping[str, int]) -> str:
    """A marker as a grammar for llguidance writes it: by its id where it is a special token."""
    return f"<[{tokens[marker]}]>" if marker in tokens else json.dumps(marker)


def thinking(inside: bool, tokens: Mapping[str, int]) -> str:
    """The rule `thinking` of a grammar: what goes before an answer."""
    special = CLOSE in tokens
    closed = (r"/(.|\n)*/ " + spelling(CLOSE, tokens) if special else "thought") + r" /\n{0,2}/"
    rule = f"thinking: {closed if inside else f'({spelling(OPEN, tokens)} {closed})?'}"
    return rule if special else rule + "\n" + r"thought[lazy]: /(.|\n)*<\/think>/"


class Count:
    """How many tokens of an answer are thinking: those before its first character, if there is any
    thinking. `inside` as of `Splitter`."""

    def __init__(self, inside: bool | None) -> None:
        self._splitter = Splitter(inside)
        self._tokens, self._thinks, self._answered = 0, False, False

    @property
    def tokens(self) -> int:
        """So far."""
        return self._tokens if self._thinks else 0

    def add(self, text: str) -> None:
        """One more token, by its text."""
        for piece in self._splitter.feed(text):
            self._thinks |= isinstance(piece, Reasoning)
            self._answered |= isinstance(piece, Content)
        self._tokens += not self._answered


class Splitter:
    """Text to reasoning and content; however it is cut, the pieces together are the same.

    `inside`: whether the prompt has opened the thinking already; None for a model that does not
    think, whose tags are content. Thinking opens nowhere but at the beginning, and the blanks on
    either side of a tag are no part of anything. What may be a tag is held back.
    """

    def __init__(self, inside: bool | None) -> None:
        self._inside = bool(inside)
        self._expected = {None: (), False: (OPEN,), True: MARKERS}[inside]
        self._tag = ""
        self._blanks: list[str] = []
        self._after_tag = self._inside
        self._pieces: list[Delta] = []

    def feed(self, text: str) -> list[Delta]:
        """What is certain after some more text."""
        if not self._expected and not self._after_tag:
            return [Content(text)] if text else []
        for char in text:
            self._step(char)
        return self._taken()

    def finish(self) -> list[Delta]:
        """What was held back, after the last piece of text."""
        if self._tag:
            self._add(self._tag)
        elif not self._after_tag:
            self._add()
        return self._taken()

    def _step(self, char: str) -> None:
        if not self._expected and not self._after_tag:
            self._add(char)
        elif char in BLANKS and not self._tag:
            self._blanks.append(char)
        elif any(marker.startswith(self._tag + char) for marker in self._expected):
            self._tag += char
            if self._tag in self._expected:
                self._inside = self._tag == OPEN
                self._expected = MARKERS if self._inside else ()
                self._after_tag, self._tag = True, ""
                self._blanks.clear()
        elif self._tag:
            tag, self._tag = self._tag, ""
            self._add(tag)
            self._step(char)
        else:
            self._add(char)

    def _add(self, *text: str) -> None:
        kind = Reasoning if self._inside else Content
        self._pieces += map(kind, text if self._after_tag else [*self._blanks, *text])
        self._blanks.clear()
        self._after_tag = False
        self._expected = (CLOSE,) if self._inside else ()

    def _taken(self) -> list[Delta]:
        taken, self._pieces = self._pieces, []
        return merged(taken)
