"""Tool calls in the text of a model, read as they come.

A `Format` is one way to write calls; `Parser` turns text into the deltas of a chat completion.
Knows no tokenizer: markers are text here, and a server spells them out (`Format.markers`) where
they are special tokens.
"""

import contextlib
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable

from ropewalk.serve.deltas import Arguments, Call, Content, Delta, merged
from ropewalk.serve.reasoning import BLANKS, CALL, CHANNEL, CONSTRAIN, MESSAGE, START, Thinking

ARGUMENTS = ("arguments", "parameters")
# Any other key before the name shows at once that an object is no call.
KEYS = (*ARGUMENTS, "name", "id", "type")
type Steps[T] = Generator[None, None, T]
type Text = tuple[str, ...]


class NotACall(Exception):
    """What is being read cannot become a call any more."""


class Enough(Exception):
    """The one call that was looked for has come to its end."""


class Reader:
    """The characters of an answer one by one, and the parts that calls are made of.

    Its methods are generators that stop where they need the next character; they raise NotACall.
    What was read is `held` until it is a call for certain, so that it can become content. With
    `single` they raise Enough at the end of the first call.
    """

    def __init__(
        self, names: Collection[str], new_id: Callable[[], str], single: bool = False
    ) -> None:
        self.names = names
        self.char = ""  # the one to be read next; empty at the end of the text
        self.held: list[str] = []
        self.deltas: list[Delta] = []
        self.calls = 0
        self._new_id, self._single = new_id, single
        self._streams = False

    def take(self) -> Steps[None]:
        """Reads one character, whatever it is."""
        if not self.char:
            raise NotACall
        if self._streams:
            self.deltas.append(Arguments(self.calls - 1, self.char))
        else:
            self.held.append(self.char)
        yield

    def blanks(self) -> Steps[None]:
        """Reads blanks, as many as there are."""
        while self.char and self.char in BLANKS:
            yield from self.take()

    def literal(self, text: str) -> Steps[None]:
        """Reads exactly this text."""
        for char in text:
            if self.char != char:
                raise NotACall
            yield from self.take()

    def word(self, words: Collection[str]) -> Steps[str]:
        """Reads one of some words; fails at the first character that none of them has."""
        read = ""
        while self.char and any(word.startswith(read + self.char) for word in words):
            read += self.char
            yield from self.take()
        if read not in words:
            raise NotACall
        return read

    def string(self, words: Collection[str] | None = None) -> Steps[str]:
        """Reads a JSON string, any or one of some words; gives its text unless it streams."""
        yield from self.literal('"')
        start = len(self.held)
        if words is not None:
            yield from self.word(words)
        while words is None and self.char != '"':
            if self.char == "\\":
                yield from self.take()
            yield from self.take()
        text = "".join(self.held[start:])
        yield from self.literal('"')
        return text

    def value(self) -> Steps[None]:
        """Reads any JSON value."""
        if self.char == '"':
            yield from self.string()
        elif self.char in ("{", "["):
            yield from self.nested(self.char)
        else:
            while self.char.isalnum() or self.char in "+-.":
                yield from self.take()

    def nested(self, begin: str) -> Steps[str]:
        """Reads a JSON object or array, held only to its strings, its brackets and the characters
        of JSON; gives its text unless it streams."""
        start, closers = len(self.held), []
        if self.char != begin:
            raise NotACall
        while True:
            if self.char == '"':
                yield from self.string()
                continue
            if self.char in "{[":
                closers.append("}" if self.char == "{" else "]")
            elif self.char in "}]":
                if self.char != closers.pop():
                    raise NotACall
            elif not self.char.isalnum() and self.char not in "+-._,:" + BLANKS:
                raise NotACall
            yield from self.take()
            if not closers:
                return "".join(self.held[start:])

    def arguments(self, name: str) -> Steps[None]:
        """Begins a call and reads its arguments, which stream."""
        if self.char != "{":
            raise NotACall
        self._begin(name)
        self._streams = True
        try:
            yield from self.nested(self.char)
        finally:
            self._streams = False

    def object(self, bare: bool = False) -> Steps[None]:
        """Reads a call that is an object of its name and its arguments, in any order. One without
        arguments is a call too, unless it is `bare`: then it may be an answer in JSON."""
        before, name, early = self.calls, None, ""
        yield from self.literal("{")
        while True:
            yield from self.blanks()
            key = yield from self.string(KEYS if name is None else None)
            yield from self.blanks()
            yield from self.literal(":")
            yield from self.blanks()
            if key == "name" and name is None:
                name = yield from self.string(self.names)
                if early:
                    self._begin(name, early)
            elif key not in ARGUMENTS or early or self.calls > before:
                yield from self.value()
            elif name is None:
                early = yield from self.nested("{")
            else:
                yield from self.arguments(name)
            yield from self.blanks()
            if self.char != ",":
                break
            yield from self.take()
        if self.calls == before:
            if name is None or bare or self.char != "}":
                raise NotACall
            self._begin(name, "{}")
        self.end()
        if self.char == "}":  # which models forget after the braces of the arguments
            yield from self.take()
        self.held.clear()

    def objects(self, separator: str, bare: bool = False) -> Steps[None]:
        """Reads such calls in a row, with or without a separator."""
        while True:
            yield from self.object(bare)
            yield from self.blanks()
            if self.char == separator:
                yield from self.take()
                yield from self.blanks()
            if self.char != "{":
                return

    def end(self) -> None:
        """Says that a call is whole."""
        if self._single:
            raise Enough

    def _begin(self, name: str, arguments: str = "") -> None:
        self.held.clear()
        self.deltas.append(Call(self.calls, self._new_id(), name))
        if arguments:
            self.deltas.append(Arguments(self.calls, arguments))
        self.calls += 1


class Format(ABC):
    """A way to write tool calls. The first of `markers` begins them.

    For a grammar, `texts` are what goes before all calls, between two of them and after all; a
    text is a tuple in which markers stand alone.
    """

    markers: tuple[str, ...]
    texts: tuple[Text, Text, Text] = ((), (), ())
    several = True
    """whether one answer can have more than one call"""
    described = False
    """whether templates fail where a tool has no description"""

    def begins(self, char: str, first: bool) -> bool:
        """Whether calls may begin with this character; `first`: nothing was answered yet."""
        return char == self.markers[0][0]

    @abstractmethod
    def read(self, reader: Reader) -> Steps[None]:
        """Reads the calls that stand together, from their first character on."""

    @abstractmethod
    def call(self, name: str) -> tuple[Text, Text]:
        """What goes before the arguments of a call and after them."""

    def new_id(self) -> str:
        """A new id for a call."""
        return f"call_{secrets.token_hex(12)}"


class Tags(Format):
    """`<tool_call>` and `</tool_call>` around each object: Hermes, Qwen 2.5 and 3."""

    markers = ("<tool_call>", "</tool_call>")
    texts = ((), ("\n",), ())

    def read(self, reader: Reader) -> Steps[None]:
        """See `Format.read`."""
        marker = yield from reader.word(self.markers[:1])
        while marker == self.markers[0]:
            yield from reader.blanks()
            yield from reader.objects(",")
            marker = yield from reader.word(self.markers)
        reader.held.clear()

    def call(self, name: str) -> tuple[Text, Text]:
        """See `Format.call`."""
        begin, end = self.markers
        return (begin, f'\n{{"name": "{name}", "arguments": '), ("}\n", end)


class Bare(Format):
    """Objects with `;` between them and nothing around, as the whole message or after
    `<|python_tag|>`: Llama 3."""

    markers = ("<|python_tag|>",)
    texts = ((), ("; ",), ())

    def begins(self, char: str, first: bool) -> bool:
        """See `Format.begins`."""
        return super().begins(char, first) or (first and char == "{")

    def read(self, reader: Reader) -> Steps[None]:
        """See `Format.read`."""
        if reader.char != "{":
            yield from reader.literal(self.markers[0])
            yield from reader.blanks()
        yield from reader.objects(";", bare=True)

    def call(self, name: str) -> tuple[Text, Text]:
        """See `Format.call`."""
        return (f'{{"name": "{name}", "parameters": ',), ("}",)


class Brackets(Format):
    """`[TOOL_CALLS]` before a list of objects: Mistral, which came to write `NamedBrackets`. Both
    are read."""

    markers = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    texts = (("[TOOL_CALLS]", " ["), (", ",), ("]",))

    def read(self, reader: Reader) -> Steps[None]:
        """See `Format.read`."""
        yield from reader.literal(self.markers[0])
        yield from reader.blanks()
        if reader.char == "[":
            yield from reader.take()
            yield from reader.blanks()
            yield from reader.objects(",")
            yield from reader.literal("]")
            reader.held.clear()
        elif reader.char == "{":
            yield from reader.objects(",")
        else:
            name, marker = (yield from reader.word(reader.names)), ""
            if reader.char == "[":
                marker = yield from reader.word(self.markers[1:])
            if marker == self.markers[1]:
                while reader.char.isalnum():
                    yield from reader.take()
                yield from reader.literal(self.markers[2])
            yield from reader.blanks()
            yield from reader.arguments(name)
            reader.end()

    def call(self, name: str) -> tuple[Text, Text]:
        """See `Format.call`."""
        return (f'{{"name": "{name}", "arguments": ',), ("}",)

    def new_id(self) -> str:
        """Nine letters and digits, as the templates of these models demand."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class NamedBrackets(Brackets):
    """`[TOOL_CALLS]name[ARGS]{...}`, once for each call."""

    texts = ((), (), ())

    def call(self, name: str) -> tuple[Text, Text]:
        """See `Format.call`."""
        return (self.markers[0], name, self.markers[2]), ()


class Recipients(Format):
    """A message to `functions.name`, which the answer ends with: gpt-oss. What it thinks and says
    before is `reasoning.Channels`' to read."""

    markers = (CHANNEL, START, CONSTRAIN, MESSAGE, CALL)
    several = False
    described = True

    def begins(self, char: str, first: bool) -> bool:
        """See `Format.begins`."""
        return super().begins(char, first) or (first and char == " ")

    def read(self, reader: Reader) -> Steps[None]:
        """See `Format.read`. The recipient stands before the channel or behind it, and the type of
        the arguments, JSON by whatever name, may follow."""
        begin, to = f"{START}assistant", " to=functions."
        first = yield from reader.word((CHANNEL, begin + CHANNEL, to, begin + to))
        early = first.endswith(to)
        name = (yield from reader.word(reader.names)) if early else ""
        if early:
            yield from reader.literal(CHANNEL)
        yield from reader.word(("analysis", "commentary", "final"))
        if not early:
            yield from reader.literal(to)
            name = yield from reader.word(reader.names)
        yield from reader.blanks()
        typed = reader.char != "<" or (yield from reader.word((MESSAGE, CONSTRAIN))) == CONSTRAIN
        while typed and (reader.char.isalnum() or reader.char in ("-", "_")):
            yield from reader.take()
        if typed:
            yield from reader.literal(MESSAGE)
        yield from reader.blanks()
        yield from reader.arguments(name)
        reader.end()

    def call(self, name: str) -> tuple[Text, Text]:
        """See `Format.call`."""
        return (CHANNEL, f"commentary to=functions.{name} ", CONSTRAIN, "json", MESSAGE), ()


def detect(chat_template: str | None) -> Format | None:
    """The way to write calls that a chat template mentions; None where it is none of ours."""
    text = chat_template or ""
    if CHANNEL in text and "functions." in text:
        return Recipients()
    if "[TOOL_CALLS]" in text:
        return NamedBrackets() if "[ARGS]" in text else Brackets()
    if "<tool_call>" in text:  # which also stands around calls that are not JSON
        return None if "<function=" in text or "<arg_key>" in text else Tags()
    if "<|python_tag|>" in text or '"parameters": dictionary' in text:
        return Bare()
    return None


class Parser:
    """The text of an answer to deltas; however it is cut, the deltas together are the same.

    `form` is how calls are written, None where none is looked for. A call is one only where its
    name is among `names`: anything else is content, to the letter. What may belong to a call is
    held back until its name and the brace of its arguments are there. The blanks around calls are
    content only where text is on both sides. With `single` nothing is read behind the first call.
    """

    def __init__(
        self,
        form: Format | None,
        names: Collection[str] = (),
        thinking: Thinking | None = None,
        single: bool = False,
    ) -> None:
        self._splitter = thinking.splitter() if thinking else None
        single = single or not (form is None or form.several)
        self._reader = Reader(names, form.new_id if form else str, single)
        self._steps = self._answer(form) if form and names else None
        self._blanks: list[str] = []
        self._beside_call = False  # the blanks at hand, that is
        self._has_content = False
        self.ended = False
        """whether the only call that there may be is whole"""

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._reader.calls

    def feed(self, text: str) -> list[Delta]:
        """What is certain after some more text."""
        self._read(self._splitter.feed(text) if self._splitter else [Content(text)] if text else [])
        return self._taken()

    def finish(self) -> list[Delta]:
        """What was held back, after the last piece of text."""
        self._read(self._splitter.finish() if self._splitter else [])
        self._reader.char = ""
        if self._steps is not None:
            next(self._steps, None)
        if not self._beside_call:
            self._reader.deltas += map(Content, self._blanks)
        return self._taken()

    def _read(self, pieces: Iterable[Delta]) -> None:
        for piece in pieces:
            if self.ended:
                return
            if self._steps is None or not isinstance(piece, Content):
                self._reader.deltas.append(piece)
                continue
            for self._reader.char in piece.text:
                next(self._steps)

    def _taken(self) -> list[Delta]:
        taken, self._reader.deltas = self._reader.deltas, []
        return merged(taken)

    def _answer(self, form: Format) -> Steps[None]:
        reader, calls = self._reader, 0
        while reader.char:
            if not form.begins(reader.char, first=not self._has_content and not calls):
                self._content(reader.char)
                yield
                continue
            try:
                with contextlib.suppress(NotACall):
                    yield from form.read(reader)
            except Enough:
                self.ended = self._beside_call = True
                break
            self._beside_call |= reader.calls > calls
            calls = reader.calls
            for char in reader.held:
                self._content(char)
            reader.held.clear()
        reader.held.clear()
        while True:
            yield

    def _content(self, char: str) -> None:
        if char in BLANKS:
            self._blanks.append(char)
            return
        if self._has_content or not self._beside_call:
            self._reader.deltas += map(Content, self._blanks)
        self._reader.deltas.append(Content(char))
        self._blanks.clear()
        self._has_content, self._beside_call = True, False
