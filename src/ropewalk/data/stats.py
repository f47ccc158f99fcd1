"""Counts over batches: what was trained on, what was cut off, what was padding."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """A global batch, or one process's rows of it.

    `arrays` holds `tokens, targets, positions, segment_ids` int32 and `weights` float32, each [b,
    t]; `names`, by row, says which documents are in it; `begins` counts documents that start here
    and `dropped` tokens that were cut off.
    """

    arrays: dict[str, np.ndarray]
    names: tuple[tuple[str, ...], ...]
    begins: int
    dropped: int


@dataclass
class Stats:
    """Sums over batches. `tokens` counts predicted tokens, `slots` places in rows, filled or
    not."""

    batches: int = 0
    documents: int = 0
    pieces: int = 0
    tokens: int = 0
    slots: int = 0
    dropped: int = 0

    @property
    def padding(self) -> int:
        """Slots that hold no token to train on."""
        return self.slots - self.tokens

    @property
    def efficiency(self) -> float:
        """Share of the slots that is trained on."""
        return self.tokens / self.slots if self.slots else 0.0

    def add(self, batch: Batch) -> None:
        """Counts one more batch."""
        self.batches += 1
        self.documents += batch.begins
        self.pieces += sum(len(row) for row in batch.names)
        self.tokens += int(np.count_nonzero(batch.arrays["weights"]))
        self.slots += batch.arrays["weights"].size
        self.dropped += batch.dropped


def count(batches: Iterable[Batch]) -> Stats:
    """The sums over some batches."""
    stats = Stats()
    for batch in batches:
        stats.add(batch)
    return stats
