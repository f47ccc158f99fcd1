"""An engine with a simple owner of pages, for tests."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from ropewalk.layers.lm import LM
from ropewalk.serve.engine import Engine, Prefix, Row
from ropewalk.serve.packed import Segment
from ropewalk.serve.programs import State
from ropewalk.serve.sizes import Sizes
from ropewalk.serve.slots import Chosen, Settings
from tests.families.tiny import tiny

SIZES = Sizes(slots=4, length=64, page=4, chunk=32, pack=3)


def engine(
    name: str, variant: str = "plain", sizes: Sizes = SIZES, draft: LM | None = None
) -> Engine:
    return Engine(model(name, variant), sizes, draft)


def model(name: str, variant: str = "plain") -> LM:
    made = tiny(name, variant)
    return made.model(jax.tree.map(lambda x: x.copy(), made.params))


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


class Desk:
    """Gives every sequence pages of its own, and keeps what the device said."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.state: State = engine.init_decode_state()
        self._fresh = [itertools.count() for _ in engine.spans]
        self.tables: dict[int, list[list[int]]] = {}

    def table(self, blocks: int | None = None) -> list[list[int]]:
        """Pages for a sequence of up to 52 tokens, in every group; none is ever given back."""
        count = min(self.engine.blocks, 13) if blocks is None else blocks
        made = [[next(fresh) for _ in range(count)] for fresh in self._fresh]
        assert all(own[-1] < most for own, most in zip(made, self.engine.sizes.pages, strict=True))
        return made

    def prefill(self, *segments: Segment, scored: bool = False) -> Prefix:
        self.state, prefix = self.engine.prefill(self.state, segments, scored)
        return prefix

    def read(
        self, tokens: Sequence[int], cut: Sequence[int] = ()
    ) -> tuple[Prefix, list[list[int]]]:
        """A sequence read alone, in chunks that end at `cut`."""
        table, prefix = self.table(), None
        for start, end in itertools.pairwise([0, *cut, len(tokens)]):
            carry = None if prefix is None else prefix.carries[0]
            prefix = self.prefill(Segment(tokens[start:end], start, table, carry))
        assert prefix is not None
        return prefix, table

    def insert(self, prefix: Prefix, *places: tuple[int, int, Settings], bits=None) -> Chosen:
        self.state, chosen = self.engine.insert(self.state, prefix, places, bits)
        return jax.tree.map(np.asarray, chosen)

    def write(self, rows: dict[int, list[list[int]]], count: int, bits=None) -> list[Chosen]:
        """Calls of `generate` for slots and their pages."""
        found = []
        for _ in range(count):
            each = [Row(slot, tables) for slot, tables in rows.items()]
            self.state, chosen = self.engine.generate(self.state, each, bits)
            found.append(jax.tree.map(np.asarray, chosen))
        return found


def solo(engine: Engine, tokens: Sequence[int], settings: Settings, cut: Sequence[int] = ()):
    """The tokens and log-probabilities of one sequence alone, up to its end."""
    desk = Desk(engine)
    prefix, table = desk.read(tokens, cut)
    desk.state = engine.tell(desk.state, 0, tokens, [])
    first = desk.insert(prefix, (0, 0, settings))
    steps = -(-(settings.limit - 1) // engine.sizes.steps)
    rest = desk.write({0: table}, steps)
    written, scores = [int(first.token[0])], [float(first.logprob[0])]
    for chosen in rest:
        kept = chosen.emitted[:, 0]
        written += chosen.token[kept, 0].tolist()
        scores += chosen.logprob[kept, 0].tolist()
    return written, scores
