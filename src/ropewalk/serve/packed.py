"""Segments of several sequences side by side in one row, as a prefill takes them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ropewalk.core.errors import ModelError
from ropewalk.layers.cache import View
from ropewalk.serve.pages import first_block


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens of one sequence to be read, from position `start` on."""

    tokens: Sequence[int]
    start: int
    tables: Sequence[Sequence[int]]
    """of every group, the page of each block of the sequence; -1 for one that is not needed"""
    carry: Any = None
    """what recurrent layers know of the tokens before, of a Prefix; None: there are none"""
    following: int = 0
    """the token after the last, whose score a scored prefill tells"""


class Packed:
    """Segments side by side in one row of a prefill, as numpy arrays."""

    def __init__(self, engine: Any, segments: Sequence[Segment], scored: bool):
        sizes, read = engine.sizes, sum(len(s.tokens) for s in segments)
        if not segments or len(segments) > sizes.pack or not 0 < read <= sizes.chunk:
            raise ModelError(
                f"{len(segments)} sequences with {read} tokens are to be read at once; the engine "
                f"takes 1 to {sizes.pack} with at most {sizes.chunk}"
            )
        length = next(n for n in engine.lengths() if n >= (sizes.chunk if scored else read))
        self.tokens = np.zeros((3, length), np.int32)  # tokens, segments, positions
        self.ends = np.zeros(sizes.pack, np.int32)
        self.following = np.zeros(length, np.int32) if scored else None
        at = 0
        for number, s in enumerate(segments):
            here = slice(at, at + len(s.tokens))
            self.tokens[0, here] = s.tokens
            self.tokens[1, here] = number + 1
            self.tokens[2, here] = np.arange(s.start, s.start + len(s.tokens))
            at += len(s.tokens)
            self.ends[number] = at - 1
            if self.following is not None:
                self.following[here] = [*s.tokens[1:], s.following]
        self.views = [self._view(engine, group, segments) for group in range(len(engine.spans))]

    def _view(self, engine: Any, group: int, segments: Sequence[Segment]) -> View:
        size, span = engine.sizes.page, engine.spans[group]
        most = engine.width
        pages = np.zeros((1, most), np.int32)
        there, owner = np.full((1, most, size), -1, np.int32), np.zeros((1, most, size), np.int32)
        place = np.full((1, self.tokens.shape[1]), engine.sizes.pages[group] * size, np.int32)
        count = at = 0
        for number, s in enumerate(segments):
            table, end = np.asarray(s.tables[group], np.int32), s.start + len(s.tokens)
            blocks = np.arange(first_block(span, s.start, size), -(-end // size))
            new = slice(count, count + len(blocks))
            pages[0, new], owner[0, new] = table[blocks], number + 1
            there[0, new] = blocks[:, None] * size + np.arange(size)
            count = new.stop
            positions = np.arange(s.start, end)
            place[0, at : at + len(s.tokens)] = table[positions // size] * size + positions % size
            at += len(s.tokens)
        seen = there.reshape(1, -1), owner.reshape(1, -1)
        every: Any = (pages, *seen, place, np.int32(count))  # on the device in a moment
        return View(*every)
