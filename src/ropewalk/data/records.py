"""Records: the units that are shuffled. A document's text, or a span of a long one, as tokens.

A long document is cut at line ends or blanks into spans of about equal size, so that a few long
works still shuffle well and fill every row of a batch. Nothing here knows of batches or order.
"""

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ropewalk.data.formats import Documents, decode
from ropewalk.data.source import Synthetic
from ropewalk.text.tokenizer import Tokenizer

_WINDOW = 256  # bytes searched for a good place to cut
_SAMPLE = 256  # documents read to estimate the text in a source
_TAIL = 64  # bytes read to know the token before a span
_LINE_END = re.compile(rb"\n(?![\r\n])")
_BLANK = re.compile(rb"\S(?=\s)")
_WORD = re.compile(rb"\S(?= \S)")


@dataclass(frozen=True, slots=True)
class Record:
    """Tokens int32 [n + 1] of which the last n are to be predicted.

    `dropped` counts tokens that were cut off; `begins` says that a document starts here.
    """

    name: str
    tokens: np.ndarray
    begins: bool = True
    dropped: int = 0


class Records(Protocol):
    """A source as numbered records; `bytes` is the size of all of them together, at most."""

    bytes: int

    def typical_bytes(self) -> float:
        """About how many bytes of text a record holds on average."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class TextRecords(Records):
    """Documents as records: BOS (or else EOS) before a document, EOS after it.

    A span that continues a document starts with the last token of the span before, which is context
    and no target: over all spans every token of the text, and the EOS, is predicted once.

    `span_bytes` is the size of a span, None for whole documents; `limit` cuts every record to that
    many predictions. `keep` int [documents] selects documents.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        keep: np.ndarray,
        span_bytes: int | None = None,
        limit: int | None = None,
    ) -> None:
        self._documents = documents
        self._tokenizer = tokenizer
        self._keep = keep
        self._span_bytes = span_bytes
        self._limit = limit
        self.bytes = int(documents.bounds[keep].sum())
        spans = np.ones(len(keep), np.int64)
        if span_bytes is not None:
            spans = np.maximum(-(-documents.bounds[keep] // span_bytes), 1)
        self._first = np.concatenate([[0], np.cumsum(spans)])
        start = (
            tokenizer.bos_id
            if tokenizer.bos_id is not None
            else next(iter(tokenizer.eos_ids), None)
        )
        self._start = [] if start is None else [start]
        self._adds_space = tokenizer.vocabulary.leading_space
        self._end = list(tokenizer.eos_ids[:1])

    def __len__(self) -> int:
        return int(self._first[-1])

    def typical_bytes(self) -> float:
        """See `Records`; some documents, evenly spaced, tell how much of the file is text."""
        some = self._keep[:: max(len(self._keep) // _SAMPLE, 1)]
        lengths = sum(self._documents.length(int(i)) for i in some)
        share = lengths / max(int(self._documents.bounds[some].sum()), 1)
        return max(share * self.bytes / len(self), 1.0)

    def __getitem__(self, index: int) -> Record:
        which = int(np.searchsorted(self._first, index, side="right")) - 1
        document = int(self._keep[which])
        span = index - int(self._first[which])
        length = self._documents.length(document)
        spans = self._spans(length)
        name = self._documents.name(document)
        if span >= spans or not length:  # the bound on the length was too high, or there is no text
            return Record(name, np.zeros(0, np.int32), begins=False)
        start, stop = (self._cut(document, length, k, spans) for k in (span, span + 1))
        text = decode(self._documents.read(document, start, stop), name, start)
        if span and self._adds_space:
            text = text.removeprefix(" ")  # encoding puts it back
        ids = self._tokenizer.encode(text)
        before = self._start if span == 0 else self._context(document, start)
        tokens = np.array(before + ids + (self._end if span + 1 == spans else []), np.int32)
        dropped = 0 if self._limit is None else max(len(tokens) - 1 - self._limit, 0)
        return Record(
            name if spans == 1 else f"{name} bytes {start}-{stop}",
            tokens[: len(tokens) - dropped],
            begins=span == 0,
            dropped=dropped,
        )

    def _spans(self, length: int) -> int:
        return 1 if self._span_bytes is None else max(-(-length // self._span_bytes), 1)

    def _cut(self, document: int, length: int, k: int, spans: int) -> int:
        """The byte at which span k begins: after a line, else before a blank, else between
        characters."""
        nominal = length * k // spans
        if k in (0, spans):
            return nominal
        window = self._documents.read(document, nominal, min(nominal + _WINDOW, length - 1))
        found = _WORD.search(window) if self._adds_space else None
        found = found or _LINE_END.search(window, 0, len(window) - 1) or _BLANK.search(window)
        if found:
            return nominal + found.end()
        skip = next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
        return nominal + skip

    def _context(self, document: int, start: int) -> list[int]:
        tail = self._documents.read(document, max(start - _TAIL, 0), start)
        skip = next((i for i, byte in enumerate(tail[:4]) if byte & 0xC0 != 0x80), 0)
        return self._tokenizer.encode(tail[skip:].decode("utf-8", "replace"))[-1:]


class SyntheticRecords(Records):
    """Documents of tokens that follow one another by rule; see `source.Synthetic`."""

    def __init__(self, config: Synthetic, seed: int, limit: int | None = None) -> None:
        self._config = config
        self._seed = seed
        self._limit = limit
        self.bytes = config.documents * config.length
        random = np.random.Generator(np.random.Philox(key=[seed, 0]))
        self._strides = random.integers(0, config.vocab_size, config.branches)
        self._names = random.permutation(config.vocab_size).astype(np.int32)

    def __len__(self) -> int:
        return self._config.documents

    def typical_bytes(self) -> float:
        """See `Records`; a token counts as a byte."""
        return float(self._config.length)

    def __getitem__(self, index: int) -> Record:
        random = np.random.Generator(np.random.Philox(key=[self._seed, index + 1]))
        steps = self._strides[random.integers(0, len(self._strides), self._config.length)]
        steps[0] = random.integers(0, self._config.vocab_size)
        tokens = self._names[np.cumsum(steps) % self._config.vocab_size]
        dropped = 0 if self._limit is None else max(len(tokens) - 1 - self._limit, 0)
        return Record(f"synthetic {index}", tokens[: len(tokens) - dropped], dropped=dropped)
