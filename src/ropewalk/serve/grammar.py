"""What an answer may be, token by token: JSON of a schema, a regular expression, or a grammar.

llguidance does the parsing; nothing here knows of arrays on a device or of HTTP. Schemas and
expressions come from strangers, and compiling one can take hours, all memory, or the process down.
So each is compiled on trial first, in a process that may die of it (`python -m` this module).
"""

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import llguidance
import numpy as np

from ropewalk.core.errors import UserError
from ropewalk.text.interface import Tokenizer

TEXT_BYTES = 256 * 1024  # of one schema, expression or grammar
COMPILE_S = 0.4  # of a processor's time
COMPILE_BYTES = 64 * 1024**2
COMPILE_STACK_BYTES = 1024**2  # less than any thread has, so that what passes here passes there
WAIT_S = 2.0  # for the trials of others
CACHE_ENTRIES = 32
CACHE_BYTES = 256 * 1024**2
LIMITS = {"max_lexer_states": 20_000, "max_items_in_row": 10_000, "verbose_errors": False}

# A space, or a line's end and an indentation: else models write blanks to the end of their tokens.
_JSON_STYLE = {"whitespace_pattern": r"\x20|\x0D?\x0A[\x20\x09]{0,32}"}
_QUOTED = re.compile(r"\d+ \||\^+$")  # a line of the grammar, or what points into one
_DEATHS = {
    signal.SIGPROF: f"takes more than {COMPILE_S} s to compile",
    signal.SIGALRM: "takes too long to compile",
    signal.SIGSEGV: "is nested too deeply, or has too many optional parts in a row",
}


class GrammarError(UserError):
    """A schema, regular expression or grammar that is wrong, unsupported, or too much work."""


class Busy(UserError):
    """Nothing is wrong, but nothing can be compiled now."""


@dataclasses.dataclass(frozen=True)
class Schema:
    """A JSON schema, draft 2020-12; `{"type": "object"}` is any JSON object."""

    schema: Mapping[str, Any]

    def entry(self) -> dict[str, Any]:
        """The schema as llguidance lists it."""
        return {"json_schema": {**self.schema, "x-guidance": _JSON_STYLE}}


@dataclasses.dataclass(frozen=True)
class Regex:
    """A regular expression that the whole answer matches; it knows no look-around and refers to
    no groups."""

    pattern: str

    def entry(self) -> dict[str, Any]:
        """The expression as llguidance lists it. Raises ValueError for half an escape, which it
        would drop."""
        if (len(self.pattern) - len(self.pattern.rstrip("\\"))) % 2:
            raise ValueError("the last backslash escapes nothing")
        return json.loads(llguidance.LLMatcher.grammar_from_regex(self.pattern))["grammars"][0]


@dataclasses.dataclass(frozen=True)
class Lark:
    """A grammar in llguidance's variant of Lark, written by the server: no limit holds for a step
    of an ambiguous one. JSON schemas of strangers may stand in it (`%json`)."""

    text: str

    def entry(self) -> dict[str, Any]:
        """The grammar as llguidance lists it."""
        return {"lark_grammar": self.text}


type Spec = Schema | Regex | Lark


class Grammars:
    """Compiles specifications for one tokenizer, and keeps what was compiled lately. Threads may
    share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's; ids beyond the tokenizer's are never allowed."""
        words = _Words.of(tokenizer, vocab_size)
        self.mask_words = -(-vocab_size // 32)
        self.known_words = -(-len(words.tokens) // 32)
        self._leading_space = tokenizer.vocabulary.leading_space
        self._tokenizer = words.build()
        self._trials = _Trials(words)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, tuple[llguidance.LLMatcher, int]] = OrderedDict()

    def compile(self, spec: Spec, thinking: str = "") -> "Matcher":
        """The matcher of one answer, at its beginning; `thinking` is the rule of that name for what
        goes before it.

        Raises GrammarError for what is wrong, unsupported, refers to another document, or goes
        beyond the limits of this module; Busy where it may be tried again.
        """
        source = self._source(spec, thinking)
        with self._lock:
            if known := self._compiled.get(source):
                self._compiled.move_to_end(source)
                return Matcher(self, source, known[0].deep_copy())
        try:
            size = self._trials.run(source) + len(source)
            compiled = self.compile_source(source)
        except GrammarError as error:
            raise GrammarError(f"the {_name(spec)} {error}") from None
        with self._lock:
            self._compiled[source] = compiled, size
            while (
                len(self._compiled) > CACHE_ENTRIES
                or sum(size for _, size in self._compiled.values()) > CACHE_BYTES
            ):
                self._compiled.popitem(last=False)
        return Matcher(self, source, compiled.deep_copy())

    def compile_source(self, source: str) -> llguidance.LLMatcher:
        """One that shares nothing with what was compiled before, which is forgotten."""
        with self._lock:
            self._compiled.pop(source, None)
        compiled = _matcher(self._tokenizer, source)
        if compiled.is_error():
            raise GrammarError(f"cannot be compiled: {_reason(compiled)}")
        return compiled

    def _source(self, spec: Spec, thinking: str) -> str:
        try:
            listed = [spec.entry()]
            # Decoding takes a space away from the beginning of what is written.
            space, thought = '" "?' if self._leading_space else "", "thinking" if thinking else ""
            if space or thought:
                start = f"start: {space} {thought} @answer\n{thinking}"
                listed = [{"lark_grammar": start}, {**listed[0], "name": "answer"}]
            source = json.dumps({"grammars": listed}, allow_nan=False)
        except RecursionError:
            raise GrammarError(f"the {_name(spec)} is nested too deeply") from None
        except (TypeError, ValueError) as error:
            raise GrammarError(f"the {_name(spec)} cannot be read: {error}") from None
        if len(source) > TEXT_BYTES:
            raise GrammarError(
                f"the {_name(spec)} has {len(source)} characters as JSON, limit {TEXT_BYTES}"
            )
        return source


class Matcher:
    """How far one sequence has come, and what may follow. One thread at a time may use it."""

    def __init__(
        self,
        grammars: Grammars,
        source: str,
        state: llguidance.LLMatcher,
        accepted: tuple[int, ...] = (),
    ) -> None:
        self._grammars = grammars
        self._source = source
        self._state = state
        self._accepted = list(accepted)
        self._shares = True

    def copy(self) -> "Matcher":
        """Another sequence that has come as far as this one."""
        return Matcher(self._grammars, self._source, self._state.deep_copy(), (*self._accepted,))

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._state.is_stopped()

    def mask(self, out: np.ndarray) -> None:
        """Fills `out`, uint32 or int32 [ceil(vocab_size / 32)], with the ids that may follow: bit
        i % 32 of word i // 32 is 1 where id i may. Once done, these are the ids that end a text.

        Raises GrammarError where finding out goes beyond the limits of a step.
        """
        words, known = self._grammars.mask_words, self._grammars.known_words
        if out.shape != (words,) or out.itemsize != 4 or not out.flags.c_contiguous:
            raise ValueError(f"a mask is 4-byte words [{words}], not {out.dtype} {out.shape}")
        out[known:] = 0
        self._state.unsafe_compute_mask_ptr(out.ctypes.data, known * 4)
        if self._state.is_error():
            self._renew()
            self._state.unsafe_compute_mask_ptr(out.ctypes.data, known * 4)
            self._check()

    def accept(self, token: int) -> None:
        """Goes on by one token. Raises GrammarError where it may not follow, or goes beyond the
        limits of a step."""
        if not self._state.consume_token(token):
            self._renew()
            self._state.consume_token(token)
            self._check()
        self._accepted.append(token)

    def _renew(self) -> None:
        # Copies share what the lexer has learnt, and its limit: others may have used it up.
        if self._shares:
            self._shares = False
            self._state = self._grammars.compile_source(self._source)
            self._state.consume_tokens(self._accepted)
        self._check()

    def _check(self) -> None:
        if self._state.is_error():
            raise GrammarError(f"the answer cannot be held to its grammar: {_reason(self._state)}")


class _Words:
    """The vocabulary as llguidance asks for it, whose names these are."""

    def __init__(self, tokens: list[bytes], special: list[int], eos: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_ids = eos
        self.eos_token_id = eos[0]
        self.bos_token_id = None
        self.tokenizer: Tokenizer | None = None
        self._greedy: Callable[[str], list[int]] = lambda text: []

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> "_Words":
        """Raises GrammarError for a tokenizer without an end."""
        pieces, specials = tokenizer.vocabulary.pieces, tokenizer.vocabulary.specials
        eos = [i for i in tokenizer.eos_ids if i < vocab_size]
        if not eos:
            raise GrammarError(f"tokenizer {tokenizer.name} has no id that ends an answer")
        special = sorted({*specials, *eos})
        tokens = list(pieces[:vocab_size])
        for i in special:
            if i < len(tokens):
                tokens[i] = (specials.get(i) or f"<|{i}|>").encode()
        words = cls(tokens, [i for i in special if i < len(tokens)], eos)
        words.tokenizer = tokenizer
        words._drop_twins()
        return words

    @classmethod
    def read(cls, line: str) -> "_Words":
        """What `written` wrote."""
        tokens, special, eos = json.loads(line)
        return cls([token.encode("latin-1") for token in tokens], special, eos)

    def written(self) -> str:
        """As one line, for another process."""
        tokens = [token.decode("latin-1") for token in self.tokens]
        return json.dumps([tokens, self.special_token_ids, self.eos_token_ids]) + "\n"

    def build(self) -> llguidance.LLTokenizer:
        """llguidance's tokenizer."""
        wrapped = llguidance.TokenizerWrapper(self)
        built = llguidance.LLTokenizer(wrapped, eos_token=self.eos_token_ids)
        self._greedy = built.greedy_tokenize
        return built

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text that stands in the middle of another, or at its beginning."""
        ids = self._encode(text.decode())
        if b"".join(self.tokens[i] for i in ids) == text:
            return ids
        return self._greedy(text.decode())

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return []
        if not self.tokenizer.vocabulary.leading_space:
            return self.tokenizer.encode(text)
        # the space that encoding adds goes before a line of its own, which is taken away
        ids, before = self.tokenizer.encode("\n" + text), b""
        while ids and before != b" \n":
            before += self.tokenizer.vocabulary.pieces[ids.pop(0)]
        return ids

    def _drop_twins(self) -> None:
        """Of ids with the same bytes llguidance knows one: here the one that encoding uses."""
        twins: dict[bytes, list[int]] = {}
        for i, token in enumerate(self.tokens):
            twins.setdefault(token, []).append(i)
        for token, ids in twins.items():
            if token and len(ids) > 1:
                used = self._encode(token.decode(errors="replace"))
                kept = used[0] if len(used) == 1 and used[0] in ids else ids[0]
                for i in ids:
                    self.tokens[i] = token if i == kept else b""


class _Trials:
    """The process in which grammars are compiled on trial, one after the other."""

    def __init__(self, words: _Words) -> None:
        self._words = words.written()
        self._lock = threading.Lock()
        self._start()

    def run(self, source: str) -> int:
        """How many bytes the compiled grammar takes, about. Raises GrammarError, and Busy."""
        if not self._lock.acquire(timeout=WAIT_S):
            raise Busy("too many grammars are being compiled; try again")
        try:
            print(json.dumps(source), file=self._input, flush=True)
            death, answer = json.loads(self._output.readline())
        except (OSError, ValueError):
            self.stop()
            self._start()
            raise Busy("the process that compiles grammars ended; try again") from None
        finally:
            self._lock.release()
        if not answer:
            raise GrammarError(_DEATHS.get(death, "cannot be compiled"))
        size, reason = json.loads(answer)
        if reason:
            raise GrammarError(f"cannot be compiled: {reason}")
        if size > COMPILE_BYTES:
            raise GrammarError(f"takes {size} bytes to compile, limit {COMPILE_BYTES}")
        return size

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # what forks has one thread
        process: Any = subprocess.Popen(
            [sys.executable, "-m", "ropewalk.serve.grammar"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.stop = weakref.finalize(self, _stop, process)
        self._input, self._output = process.stdin, process.stdout
        print(self._words, end="", file=self._input, flush=True)


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _serve_trials() -> None:
    """The other side of `_Trials`: a line in, a line out. Each trial is a fork, which the system
    ends where it goes beyond its limits."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = _Words.read(sys.stdin.readline()).build()
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(writer, json.dumps(_try(tokenizer, json.loads(line))).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, encoding="utf-8") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps([os.WTERMSIG(status), answer]), flush=True)


def _try(tokenizer: llguidance.LLTokenizer, source: str) -> tuple[int, str]:
    """Bytes that the compiled grammar takes, and what is wrong with it."""
    before = _peak_bytes()
    resource.setrlimit(resource.RLIMIT_STACK, (COMPILE_STACK_BYTES, COMPILE_STACK_BYTES))
    signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
    signal.alarm(10)
    matcher = _matcher(tokenizer, source)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _peak_bytes() - before, _reason(matcher)


def _matcher(tokenizer: llguidance.LLTokenizer, source: str) -> llguidance.LLMatcher:
    limits = llguidance.LLParserLimits(**LIMITS)
    return llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)


def _reason(matcher: llguidance.LLMatcher) -> str:
    told = matcher.get_error().removesuffix("\n<non-verbose/>")
    if told.startswith("NoExtension"):
        return "no text fits"
    if told.startswith("oneOf"):
        return "oneOf is supported where its parts differ by the text of a required key; use anyOf"
    told = re.sub(r"^at \d+\(\d+\): ", "", told)  # of a text that nobody outside knows
    lines = (line.strip() for line in told.splitlines() if len(line) < 200)
    return " ".join(line for line in lines if not _QUOTED.match(line))[:500] or told[:200]


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _name(spec: Spec) -> str:
    return {Schema: "JSON schema", Regex: "regular expression", Lark: "grammar"}[type(spec)]


if __name__ == "__main__":
    _serve_trials()
