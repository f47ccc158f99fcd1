"""Packing: records into rows of fixed length, one *lane* for every row of the global batch.

A lane owns its share of the record stream whatever process runs it, so its state means the same for
any number of processes. Pieces that do not fit yet wait in the lane; its state names them by record
and number, and they are made again when the state is restored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ropewalk.core.errors import DataError
from ropewalk.data.records import Record

# How far a lane reads ahead, in rows: the more short pieces wait, the better rows fill up.
SHORT_ROWS = 6
ALL_ROWS = 24


@dataclass(frozen=True, slots=True)
class Piece:
    """At most a row's worth of one record: int32 [n + 1] tokens, n of them targets."""

    index: int
    number: int
    record: Record
    tokens: np.ndarray

    @property
    def size(self) -> int:
        """Slots that the piece takes in a row."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Plan:
    """What all lanes share: the record stream and how it is dealt out and packed.

    `record` maps an index of the stream to its record; `total` is the length of the stream; an
    `epoch` is as many records. Lane r of `lanes` takes one record of every block of `lanes`,
    shuffled or in turn.
    """

    record: Callable[[int], Record]
    total: int
    epoch: int
    lanes: int
    length: int
    seed: int
    shuffled: bool
    packed: bool


class Lane:
    """The rows, one after the other, of one place in the global batch."""

    def __init__(self, plan: Plan, lane: int) -> None:
        self._plan = plan
        self._lane = lane
        self._block = 0
        self._rows = 0
        self._waiting: list[Piece] = []
        self._short = 0
        self._all = 0

    def next_row(self) -> list[Piece]:
        """The pieces of the next row, at most `length` slots together; empty when the records
        are used up."""
        self._fill()
        if not self._waiting:
            return []
        plan = self._plan
        lead = _mix(plan.seed, self._lane, self._rows) % len(self._waiting) if plan.shuffled else 0
        self._rows += 1
        row = [self._take(lead)]
        room = plan.length - row[0].size
        while plan.packed and room and (best := self._best_fit(room)) is not None:
            row.append(self._take(best))
            room -= row[-1].size
        return row

    def get_state(self) -> list[Any]:
        """[next block, rows made, [[record index, piece numbers ...] ...]]"""
        waiting: list[list[int]] = []
        for piece in self._waiting:
            if not waiting or waiting[-1][0] != piece.index:
                waiting.append([piece.index])
            waiting[-1].append(piece.number)
        return [self._block, self._rows, waiting]

    def set_state(self, state: Sequence[Any]) -> None:
        """Goes back to where `get_state` was called; the waiting records are read again."""
        self._block, self._rows = int(state[0]), int(state[1])
        self._waiting = []
        for index, *numbers in state[2]:
            pieces = self._pieces(index)
            if max(numbers) >= len(pieces):
                raise DataError(
                    f"the data state has piece {max(numbers)} of a record that now has"
                    f" {len(pieces)}: the data or the tokenizer changed since it was saved"
                )
            self._waiting += [pieces[number] for number in numbers]
        self._all = sum(piece.size for piece in self._waiting)
        self._short = sum(piece.size for piece in self._waiting if piece.size < self._plan.length)

    def _fill(self) -> None:
        plan = self._plan
        empty = 0
        while self._short < SHORT_ROWS * plan.length and self._all < ALL_ROWS * plan.length:
            turn = _mix(plan.seed, self._block, -1) if plan.shuffled else 0
            index = self._block * plan.lanes + (self._lane + turn) % plan.lanes
            if self._block * plan.lanes >= plan.total:
                return
            self._block += 1
            pieces = self._pieces(index) if index < plan.total else []
            for piece in pieces:
                self._waiting.append(piece)
                self._all += piece.size
                self._short += piece.size if piece.size < plan.length else 0
            empty = 0 if pieces else empty + 1
            if empty > plan.epoch:
                raise DataError(
                    f"data: {empty} records in a row hold no text; is `column` the right one?"
                )

    def _pieces(self, index: int) -> list[Piece]:
        record, length = self._plan.record(index), self._plan.length
        starts = range(0, max(len(record.tokens) - 1, 0), length)
        return [
            Piece(index, k, record, record.tokens[start : start + length + 1])
            for k, start in enumerate(starts)
        ]

    def _take(self, i: int) -> Piece:
        piece = self._waiting.pop(i)
        self._all -= piece.size
        self._short -= piece.size if piece.size < self._plan.length else 0
        return piece

    def _best_fit(self, room: int) -> int | None:
        best = None
        for i, piece in enumerate(self._waiting):
            if piece.size <= room and (best is None or piece.size > self._waiting[best].size):
                best = i
        return best


def fill(rows: Sequence[Sequence[Piece]], length: int) -> dict[str, np.ndarray]:
    """The arrays of a batch, each [rows, length]: `tokens`, `targets`, `positions`, `segment_ids`
    int32 and `weights` float32.

    A piece is a segment, numbered from 1 in its row, with positions from 0; padding is all zeros.
    """
    names = ("tokens", "targets", "positions", "segment_ids")
    batch: dict[str, np.ndarray] = {name: np.zeros((len(rows), length), np.int32) for name in names}
    batch["weights"] = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row, 1):
            place = i, slice(start, start + piece.size)
            batch["tokens"][place] = piece.tokens[:-1]
            batch["targets"][place] = piece.tokens[1:]
            batch["positions"][place] = np.arange(piece.size)
            batch["segment_ids"][place] = segment
            batch["weights"][place] = 1.0
            start += piece.size
    return batch


def _mix(*values: int) -> int:
    """A well-mixed 64-bit number from a few integers (splitmix64)."""
    state = 0
    for value in values:
        state = (state ^ value) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state
