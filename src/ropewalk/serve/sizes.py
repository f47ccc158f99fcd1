"""What the programs of serving are compiled for, and how many pages there are."""

import dataclasses
from collections.abc import Sequence

from ropewalk.core.errors import ModelError
from ropewalk.serve.pages import seen_blocks


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the programs are compiled for."""

    slots: int = 8
    length: int = 2048
    """most tokens of a sequence"""
    page: int = 16
    """tokens of a page"""
    pages: tuple[int, ...] = ()
    """of each group; by default enough for every slot at its longest, as far as `memory` goes"""
    memory: int | None = None
    """bytes for all pages"""
    chunk: int = 256
    """most tokens of one prefill"""
    pack: int = 4
    """most sequences of one prefill"""
    steps: int = 1
    """steps of one call of `generate`"""
    drafts: int = 0
    """tokens guessed ahead of every step"""
    cache: str | None = None
    """dtype of the cached keys and values; by default that of the model, int8 for quantized"""

    @property
    def lookahead(self) -> int:
        """Most tokens that a sequence gets in one call of `generate`."""
        return self.steps * (1 + self.drafts)

    def fitted(self, longest: int, spans: Sequence[int | None], costs: Sequence[int]) -> "Sizes":
        """With a number of pages for every group of layers, which sees `spans` keys (None = all)
        and of which a page takes `costs` bytes.

        Raises ModelError where not one sequence of `length` fits, or a model of `longest` positions
        has not as many.
        """
        if not 1 <= self.length <= longest:
            raise ModelError(
                f"sequences of {self.length} tokens are asked for; the model has {longest} "
                "positions: lower max_length"
            )
        run = max(self.chunk, 2 * self.lookahead + 1)
        held = [seen_blocks(span, self.length, run, self.page) for span in spans]
        most = [self.slots * each for each in held]
        total = sum(count * cost for count, cost in zip(most, costs, strict=True))
        if self.memory is not None and total > self.memory:
            most = [int(count * (self.memory / total)) for count in most]
        pages = self.pages or tuple(most)
        for count, least in zip(pages, held, strict=True):
            if count < least:
                room = "" if self.memory is None else f" in {self.memory / 2**30:.1f} GiB"
                raise ModelError(
                    f"{count} pages of {self.page} tokens{room} cannot hold one sequence of "
                    f"{self.length}, which has {least}: give more memory, or lower max_length"
                )
        return dataclasses.replace(self, pages=pages)
