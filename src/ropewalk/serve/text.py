"""Tokens of one answer to text, piece by piece, up to a stop string; and how tokens are shown with
their log-probabilities."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ropewalk.serve.service import Token
from ropewalk.text.interface import StreamDecoder, Tokenizer

# What is told of a token that has no probability: JSON knows no infinity.
_LEAST = -9999.0


class Writer:
    """The text of one answer. A character comes out whole, and what may be the beginning of a stop
    string only when it is not."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        ends: Iterable[int] = (),
        spelled: Mapping[int, str] | None = None,
        follows: bool = False,
    ):
        """`ends`: ids that are no part of the text; `spelled`: special ids that are written out;
        `follows`: as of StreamDecoder."""
        self._decoder = StreamDecoder(tokenizer, follows)
        self._stops, self._ends, self._spelled = stops, frozenset(ends), spelled or {}
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain after one more token; after a stop string, none."""
        if self.stopped or token in self._ends:
            return ""
        return self._passed(self._spelled.get(token) or self._decoder.feed(token))

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        text = self._passed(self._decoder.finish())
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _passed(self, text: str) -> str:
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def spelled(tokenizer: Tokenizer, markers: Iterable[str]) -> dict[int, str]:
    """Special ids whose spelling is one of `markers`."""
    wanted = set(markers)
    return {i: text for i, text in tokenizer.vocabulary.specials.items() if text in wanted}


def piece(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """A token as text and as bytes; where it is part of a character, the text is `bytes:\\x..`."""
    pieces = tokenizer.vocabulary.pieces
    raw = pieces[token] if token < len(pieces) else b""
    raw = raw or tokenizer.spelling(token).encode()
    try:
        return raw.decode("utf-8"), list(raw)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], top: int) -> dict[str, Any]:
    """As `choices[].logprobs` of a chat completion."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, raw = piece(tokenizer, token)
        return {"token": text, "logprob": _finite(logprob), "bytes": raw}

    content = [
        {
            **entry(token.id, token.logprob),
            "top_logprobs": [entry(*ranked) for ranked in token.ranked[:top]],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST) if math.isfinite(logprob) else _LEAST


class Scores:
    """`choices[].logprobs` of one text completion, told at once or piece by piece."""

    def __init__(self, tokenizer: Tokenizer, top: int, follows: bool = False):
        """`follows`: as of StreamDecoder."""
        self._tokenizer, self._top = tokenizer, top
        self._decoder, self._offset = StreamDecoder(tokenizer, follows), 0

    def told(self, tokens: Sequence[Token], unscored: int = 0) -> dict[str, Any]:
        """Of the next tokens; the first `unscored` have no log-probability. Offsets are those of
        characters in the text: a token within one has that one's."""
        told: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for number, token in enumerate(tokens):
            text, _ = piece(self._tokenizer, token.id)
            scored, ranked = number >= unscored, reversed(token.ranked[: self._top])
            best = {piece(self._tokenizer, i)[0]: _finite(value) for i, value in ranked}
            logprob = _finite(token.logprob)
            told["tokens"].append(text)
            told["token_logprobs"].append(logprob if scored else None)
            told["top_logprobs"].append({**best, text: logprob} if scored and self._top else None)
            told["text_offset"].append(self._offset)
            self._offset += len(self._decoder.feed(token.id))
        return told
