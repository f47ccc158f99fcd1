"""What a model thinks split from what it answers, as the text comes.

A `Thinking` is one way to mark thoughts: `ThinkTags` as most models, `Channels` as gpt-oss. Knows
no tokenizer: markers are text here, and a server spells them out where they are special tokens.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from ropewalk.serve.deltas import Content, Delta, Reasoning, merged

OPEN, CLOSE = "<think>", "</think>"
START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = _ENDS = "<|end|>", "<|call|>", "<|return|>"
_TO = " to="
BLANKS = " \t\r\n"


def spelling(marker: str, tokens: Mapping[str, int]) -> str:
    """A marker, or other text, as a grammar for llguidance writes it: by its id where it is a
    special token."""
    return f"<[{tokens[marker]}]>" if marker in tokens else json.dumps(marker)


def _until(marker: str, tokens: Mapping[str, int]) -> tuple[str, str]:
    """Any text up to a marker, and a rule that is needed for it, in a grammar."""
    if marker in tokens:
        return r"/(.|\n)*/ " + spelling(marker, tokens), ""
    closed = re.escape(marker).replace("/", r"\/")
    return "thought", "\n" + rf"thought[lazy]: /(.|\n)*{closed}/"


class Splitter(ABC):
    """Text to reasoning and content; however it is cut, the pieces together are the same."""

    def __init__(self) -> None:
        self._pieces: list[Delta] = []

    def feed(self, text: str) -> list[Delta]:
        """What is certain after some more text."""
        for char in text:
            self._step(char)
        return self._taken()

    def finish(self) -> list[Delta]:
        """What was held back, after the last piece of text."""
        self._end()
        return self._taken()

    @abstractmethod
    def _step(self, char: str) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...

    def _taken(self) -> list[Delta]:
        taken, self._pieces = self._pieces, []
        return merged(taken)


class Thinking(ABC):
    """How an answer begins to think, and how its thoughts are marked."""

    markers: tuple[str, ...]

    @abstractmethod
    def splitter(self) -> Splitter:
        """For one answer."""

    @abstractmethod
    def rule(self, tokens: Mapping[str, int], content: bool = False) -> str:
        """The rule `thinking` of a grammar: what goes before calls, or before content that keeps
        to a format; empty where nothing does. `tokens`: the ids of special tokens."""


@dataclass(frozen=True)
class ThinkTags(Thinking):
    """`<think>` and `</think>` around what is thought before the answer."""

    inside: bool
    """whether the prompt has opened the thinking already"""

    markers = (OPEN, CLOSE)

    def splitter(self) -> Splitter:
        """See `Thinking.splitter`."""
        return _TagSplitter(self.inside)

    def rule(self, tokens: Mapping[str, int], content: bool = False) -> str:
        """See `Thinking.rule`. A format holds from the beginning, unless the prompt has opened the
        thinking."""
        if content and not self.inside:
            return ""
        thought, rule = _until(CLOSE, tokens)
        closed = rf"{thought} /\n{{0,2}}/"
        begun = closed if self.inside else f"({spelling(OPEN, tokens)} {closed})?"
        return f"thinking: {begun}{rule}"


class _TagSplitter(Splitter):
    """Thinking opens nowhere but at the beginning, and the blanks on either side of a tag are no
    part of anything. What may be a tag is held back."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self._inside = inside
        self._expected = (OPEN, CLOSE) if inside else (OPEN,)
        self._tag = ""
        self._blanks: list[str] = []
        self._after_tag = inside

    def feed(self, text: str) -> list[Delta]:
        """See `Splitter.feed`."""
        if not self._expected and not self._after_tag:
            return [Content(text)] if text else []
        return super().feed(text)

    def _step(self, char: str) -> None:
        if not self._expected and not self._after_tag:
            self._add(char)
        elif char in BLANKS and not self._tag:
            self._blanks.append(char)
        elif any(marker.startswith(self._tag + char) for marker in self._expected):
            self._tag += char
            if self._tag in self._expected:
                self._inside = self._tag == OPEN
                self._expected = (OPEN, CLOSE) if self._inside else ()
                self._after_tag, self._tag = True, ""
                self._blanks.clear()
        elif self._tag:
            tag, self._tag = self._tag, ""
            self._add(tag)
            self._step(char)
        else:
            self._add(char)

    def _end(self) -> None:
        if self._tag:
            self._add(self._tag)
        elif not self._after_tag:
            self._add()

    def _add(self, *text: str) -> None:
        kind = Reasoning if self._inside else Content
        self._pieces += map(kind, text if self._after_tag else [*self._blanks, *text])
        self._blanks.clear()
        self._after_tag = False
        self._expected = (CLOSE,) if self._inside else ()


@dataclass(frozen=True)
class Channels(Thinking):
    """Messages, each with a channel that its header names: `analysis` is thought, `commentary` and
    `final` are said. The prompt ends behind `<|start|>assistant`.

    Source: https://cookbook.openai.com/articles/openai-harmony
    """

    markers = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)

    def splitter(self) -> Splitter:
        """See `Thinking.splitter`."""
        return _ChannelSplitter()

    def rule(self, tokens: Mapping[str, int], content: bool = False) -> str:
        """See `Thinking.rule`."""

        def spelt(*text: str) -> str:
            return " ".join(spelling(part, tokens) for part in text)

        thought, rule = _until(END, tokens)
        analysis = f"({spelt(CHANNEL, 'analysis', MESSAGE)} {thought} {spelt(START, 'assistant')})?"
        header = spelt(CHANNEL, "final", MESSAGE) if content else ""
        return f"thinking: {analysis} {header}{rule}"


class _ChannelSplitter(Splitter):
    """A message without a recipient is told without its header and end, any other, as to a tool, to
    the letter. After what is said and not the end there is an empty line. A header without a
    message is nothing."""

    _HEADER = re.compile(
        rf"({re.escape(START)}assistant)?{re.escape(CHANNEL)}(?P<channel>analysis|commentary|final)"
        rf"(\s*{re.escape(CONSTRAIN)}[\w-]*|\s+[\w-]+)?\s*{re.escape(MESSAGE)}"
    )
    _HEADER_CHARS = 256

    def __init__(self) -> None:
        super().__init__()
        self._kind: type[Content | Reasoning] | None = None  # None within a header
        self._raw = False
        self._held = ""

    def feed(self, text: str) -> list[Delta]:
        """See `Splitter.feed`."""
        if self._kind is not None and not self._held and "<" not in text:
            self._tell(text)
            return self._taken()
        return super().feed(text)

    def _step(self, char: str) -> None:
        self._held += char
        if self._kind is None:
            self._read_header()
        else:
            self._read_body()

    def _end(self) -> None:
        begun = self._held.startswith((START, CHANNEL, _TO))
        if not begun or (self._kind is not None and not self._held.endswith(MESSAGE)):
            self._tell(self._held)

    def _read_header(self) -> None:
        held = self._held
        begins = any(m.startswith(held) or held.startswith(m) for m in (START, CHANNEL, _TO))
        if begins and held.endswith(_ENDS):
            self._held = ""
        elif not begins or held.endswith(MESSAGE) or len(held) >= self._HEADER_CHARS:
            known = self._HEADER.fullmatch(held)
            self._raw = known is None
            self._kind = Reasoning if known and known["channel"] == "analysis" else Content
            if known:
                self._held = ""
            elif not held.endswith(MESSAGE):  # behind which its body is awaited
                self._read_body()

    def _read_body(self) -> None:
        held = self._held
        if held.endswith(_ENDS):
            goes_on = self._kind is Content and held.endswith(END)
            self._tell(held if self._raw else held[: held.rindex("<")] + "\n\n" * goes_on)
            self._kind, self._held = None, ""
            return
        tail = held[held.rfind("<") :] if "<" in held else ""
        self._held = tail if any(end.startswith(tail) for end in _ENDS) else ""
        self._tell(held.removesuffix(self._held))

    def _tell(self, text: str) -> None:
        if text:
            self._pieces.append((self._kind or Content)(text))


def detect(chat_template: str | None, prompt: str) -> Thinking | None:
    """How the answer to a prompt thinks, by what the template mentions; None where it knows no
    thinking, whose markers are content then."""
    template = chat_template or ""
    if CHANNEL in template and MESSAGE in template:
        return Channels()
    if CLOSE in template:
        return ThinkTags(prompt.rstrip(BLANKS).endswith(OPEN))
    return None


class Count:
    """How many tokens of an answer are thinking: all but those whose text is answer, and the tags
    and headers behind which there is some, if there is any thinking."""

    def __init__(self, thinking: Thinking | None) -> None:
        self._splitter = thinking.splitter() if thinking else None
        self._tokens, self._thinks, self._answers = 0, False, False

    @property
    def tokens(self) -> int:
        """So far."""
        return self._tokens if self._thinks else 0

    def add(self, text: str) -> None:
        """One more token, by its text."""
        for piece in self._splitter.feed(text) if self._splitter else ():
            self._answers = isinstance(piece, Content)
            self._thinks |= not self._answers
        self._tokens += not self._answers
