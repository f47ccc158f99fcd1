"""The device side of serving: caches in pages, and the few programs that read and write them.

Whoever calls says which pages a sequence has and which slot; here nothing is decided. Programs run
in the order they are called, so a page may be given to another as soon as its last reader was sent.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ropewalk.core.errors import ModelError
from ropewalk.layers.decode import mesh_of, ready
from ropewalk.layers.lm import LM, parameters, table
from ropewalk.serve import slots as slots_
from ropewalk.serve.packed import Packed, Segment
from ropewalk.serve.programs import EVERY, Programs, Scores, State
from ropewalk.serve.sizes import Sizes
from ropewalk.serve.slots import Chosen, Settings

# The shortest prefill.
_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What reading some segments left beside the pages."""

    hidden: jax.Array
    """[p, d], the final hidden state of each segment's last token"""
    sums: jax.Array
    """float32 [p, d], of the final hidden states of each segment's tokens"""
    carries: Sequence[Any]
    """of each segment, what recurrent layers know now"""
    lengths: Sequence[int]
    """tokens of each sequence so far"""
    scores: Scores | None = None
    """of every token read, one row after the other: the log-probability of its successor, float32
    [t], the most likely successors int32 [t, MOST_RANKED] and their log-probabilities"""


@dataclasses.dataclass(frozen=True)
class Row:
    """A slot that is to write, and its sequence's pages as in Segment."""

    slot: int
    tables: Sequence[Sequence[int]]


class Engine:
    """A model and the programs that serve it. Every method that gives back a State consumes the
    one it is given."""

    def __init__(self, model: LM, sizes: Sizes | None = None, draft: LM | None = None):
        """Takes over `model`, a concrete module; and `draft`, a smaller one with the same tokens
        that guesses ahead, where `sizes.drafts` says so (without one, guesses come from what was
        written before). Raises ModelError for what cannot be."""
        sizes = sizes or Sizes()
        self.mesh = mesh_of(model)
        self._axes = _kv_axes(model)
        made = [ready(one) for one in (model, draft) if one is not None]
        self.vocab = model.config.vocab_size
        self._weights = [parameters(one) for one in made]
        structure, *drafts = [jax.eval_shape(lambda one=one: one) for one in made]
        self._layers = [block for one in (structure, *drafts) for block in one.layers.blocks()]
        self._dtypes = [
            weights["embed.weight"].dtype
            for one, weights in zip((structure, *drafts), self._weights, strict=True)
            for _ in one.layers.blocks()
        ]
        spans = _spans(structure, sizes.length)
        self.spans = tuple(sorted({s for s in spans if s != 0}, key=lambda s: (s is not None, s)))
        self.recurrent = 0 in spans
        self.groups = [None if span == 0 else self.spans.index(span) for span in spans]
        if sizes.drafts and self.recurrent:
            raise ModelError(
                f"{sizes.drafts} tokens are to be guessed ahead of every step, and this model's "
                "recurrent layers cannot take back what they read: set drafts to 0"
            )
        for one in drafts:
            self.groups += _shared(one, self.spans, sizes)
        self.sizes = sizes.fitted(structure.config.longest(), self.spans, self._costs(sizes))
        self.blocks = math.ceil(self.sizes.length / self.sizes.page)
        self._programs = Programs(
            structure, next(iter(drafts), None), self.sizes, self.spans, self.groups
        )
        self._zero = self._carry()
        self._compile()

    @property
    def width(self) -> int:
        """Most pages that the segments of one prefill look at together, in any group."""
        return self._programs.columns(self.blocks + 2 * self.sizes.pack)

    # What callers do.

    def init_decode_state(self) -> State:
        """Empty pages, and slots that are all done."""
        return self._init()

    def prefill(
        self, state: State, segments: Sequence[Segment], scored: bool = False
    ) -> tuple[State, Prefix]:
        """Reads segments packed into one row; each sees its own sequence only.

        `scored` prefills tell how likely every token was, at the price of its logits.
        """
        row = Packed(self, segments, scored)
        carries = [self._zero if s.carry is None else s.carry for s in segments]
        carries += [self._zero] * (self.sizes.pack - len(segments))
        state, (hidden, sums), after, scores = self._prefill(
            self._weights, state, row.tokens, row.views, row.ends, tuple(carries), row.following
        )
        lengths = [s.start + len(s.tokens) for s in segments]
        return state, Prefix(hidden, sums, after[: len(segments)], lengths, scores)

    def insert(
        self,
        state: State,
        prefix: Prefix,
        places: Sequence[tuple[int, int, Settings]],
        bits: np.ndarray | None = None,
    ) -> tuple[State, Chosen]:
        """Gives slots to prefixes and chooses their first tokens.

        places: (which segment of the prefix, slot, settings), at most `pack` in one call, the same
        segment as often as wanted; bits as in `slots.choose`, a row a place.
        """
        most = self.sizes.pack
        which = np.zeros(most, np.int32)
        slot = np.full(most, self.sizes.slots, np.int32)
        which[: len(places)] = [segment for segment, _, _ in places]
        slot[: len(places)] = [place for _, place, _ in places]
        entries = [(settings, prefix.lengths[segment]) for segment, _, settings in places]
        new = slots_.rows(entries, most, self.vocab)
        carries = [prefix.carries[int(i)] for i in which]
        return self._insert(
            self._weights, state, prefix.hidden, which, tuple(carries), slot, new,
            *self._bits(bits, most),
        )  # fmt: skip

    def generate(
        self, state: State, rows: Sequence[Row], bits: np.ndarray | None = None
    ) -> tuple[State, Chosen]:
        """The next tokens of some slots, [lookahead, b] each, padded to a power of two of rows.

        Their pages must have room for `lookahead` more tokens.
        """
        many = self.rows(len(rows))
        slot = np.full(many, self.sizes.slots, np.int32)
        slot[: len(rows)] = [row.slot for row in rows]
        tables = [
            np.zeros((many, self._programs.columns(self.blocks)), np.int32) for _ in self.spans
        ]
        for place, row in enumerate(rows):
            for held, own in zip(tables, row.tables, strict=True):
                held[place, : len(own)] = own
        return self._generate(self._weights, state, slot, tuple(tables), *self._bits(bits, many))

    def tell(self, state: State, slot: int, prompt: Sequence[int], written: Sequence[int]) -> State:
        """Tells a slot that is about to be inserted what penalties and guesses go by."""
        row = np.zeros(self.vocab, np.int32)
        row[np.unique(np.asarray(prompt, np.int64))] += slots_.PROMPTED
        np.add.at(row, np.asarray(written, np.int64), 1)
        tokens = np.zeros(self.sizes.length, np.int32)
        tokens[: len(prompt) + len(written)] = [*prompt, *written]
        return self._tell(state, slot, row, tokens)

    def copy(self, state: State, group: int, source: int, target: int) -> State:
        """Copies a page, for a sequence that goes on from where another one shares it."""
        return self._copy[group](state, source, target)

    def warm(self) -> Iterator[tuple[int, int]]:
        """Compiles every program that serving runs, and tells after each how many of how many."""
        state, tables = self.init_decode_state(), [[0] * self.blocks for _ in self.spans]
        read = [(length, False) for length in self.lengths()] + [(self.sizes.chunk, True)]
        many = sorted({self.rows(n + 1) for n in range(self.sizes.slots)})
        total, done = len(read) + len(many) + 2, 0
        state = self.tell(state, 0, [0], [])
        yield (done := done + 1), total
        for length, scored in reversed(read):
            longest, most = self.sizes.length, min(length, self.sizes.length * self.sizes.pack)
            parts = [min(longest, most - at) for at in range(0, most, longest)]
            segments = [Segment([0] * part, 0, tables) for part in parts]
            state, prefix = self.prefill(state, segments, scored)
            yield (done := done + 1), total
            if (length, scored) == read[0]:
                state, _ = self.insert(state, prefix, [(0, 0, Settings(limit=1))])
                yield (done := done + 1), total
        for count in many:
            state, _ = self.generate(state, [Row(slot, tables) for slot in range(count)])
            yield (done := done + 1), total

    def programs(self) -> int:
        """How many programs were compiled so far."""
        made: list[Any] = [self._prefill, self._insert, self._generate, self._tell, *self._copy]
        return sum(program._cache_size() for program in made)

    def rows(self, count: int) -> int:
        """The number of rows that `count` slots are padded to."""
        return min(self.sizes.slots, 1 << (count - 1).bit_length())

    def lengths(self) -> list[int]:
        """The lengths that prefills are padded to."""
        most, powers = self.sizes.chunk, [_SHORTEST << i for i in range(32)]
        # From 64 on also in the middle: padding costs more there than a program.
        every = {*powers, *(3 * size // 2 for size in powers if size >= 64)}
        return [*sorted(size for size in every if size < most), most]

    # Programs.

    def _compile(self) -> None:
        programs, state = self._programs, self._shardings()
        whole = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        make = functools.partial(programs.make, self._dtypes)
        self._init = jax.jit(make, out_shardings=state)
        donate = functools.partial(jax.jit, donate_argnums=1)
        self._prefill = donate(programs.read, out_shardings=(state, whole, whole, whole))
        self._insert = donate(programs.begin, out_shardings=(state, whole))
        self._generate = donate(programs.write, out_shardings=(state, whole))
        first = functools.partial(jax.jit, donate_argnums=0, out_shardings=state)
        self._tell = first(programs.told)
        self._copy = [
            first(functools.partial(programs.copied, group)) for group in range(len(self.spans))
        ]

    # Small things.

    @property
    def pages_bytes(self) -> int:
        """Bytes that all pages take on a device."""
        each = zip(self.sizes.pages, self._costs(self.sizes), strict=True)
        return sum(count * cost for count, cost in each)

    @property
    def _ways(self) -> int:
        """Over how many devices the heads of keys lie."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in self._axes)

    def _costs(self, sizes: Sizes) -> list[int]:
        """Bytes of a page of each group, on a device."""
        costs = [0] * len(self.spans)
        for group, layer, dtype in zip(self.groups, self._layers, self._dtypes, strict=True):
            if group is not None:
                kept = functools.partial(layer.attention.init_pages, 1, sizes.page)
                page = jax.eval_shape(functools.partial(kept, sizes.cache or dtype))
                for x in jax.tree.leaves(page):
                    part = 1 if x.shape[1] % self._ways else self._ways
                    costs[group] += x.size * x.dtype.itemsize // part
        return costs

    def _carry(self) -> list[Any]:
        """What recurrent layers know before the first token."""
        layers = self._programs.recurrents()
        return [self._layers[i].attention.init_cache(1, 1, self._dtypes[i]) for i in layers]

    @functools.cached_property
    def _everything(self) -> dict[int, jax.Array]:
        words = -(-self.vocab // 32)
        counts = {self.sizes.pack, *(self.rows(n + 1) for n in range(self.sizes.slots))}
        return {count: jnp.full((count, words), EVERY) for count in counts}

    def _bits(self, bits: np.ndarray | None, count: int) -> tuple[Any, np.bool]:
        if bits is None:
            return self._everything[count], np.False_
        rest = np.repeat(bits[:1], count - len(bits), axis=0)
        # On the device already, as the others are: else it is another signature.
        return jax.device_put(np.concatenate([bits, rest])), np.True_

    def _shardings(self) -> State | None:
        """Pools [p, k, size, ...] lie as the heads of keys do; everything else on every device."""
        if self.mesh is None:
            return None
        whole = NamedSharding(self.mesh, PartitionSpec())
        split = NamedSharding(self.mesh, PartitionSpec(None, self._axes))
        state = jax.eval_shape(functools.partial(self._programs.make, self._dtypes))
        caches = [
            jax.tree.map(
                lambda pool, own=group: (
                    whole if own is None or pool.shape[1] % self._ways else split
                ),
                cache,
            )
            for cache, group in zip(state.caches, self.groups, strict=True)
        ]
        rest = jax.tree.map(lambda _: whole, state)
        return dataclasses.replace(rest, caches=caches)


def _kv_axes(model: LM) -> tuple[str, ...]:
    """The mesh axes over which the heads of keys lie, as they do in the weights."""
    values = parameters(model)
    for path, spec in table(model).items():
        sharding = values[path].sharding
        if "kv_heads" in spec.axes and isinstance(sharding, NamedSharding):
            names = [*sharding.spec, *[None] * len(spec.axes)][spec.axes.index("kv_heads")]
            return () if names is None else (names,) if isinstance(names, str) else tuple(names)
    return ()


def _spans(model: LM, length: int) -> list[int | None]:
    """Of each layer, how many of the last keys a query sees: None for all, 0 without keys."""
    spans = [block.attention.span for block in model.layers.blocks()]
    return [None if span is not None and span >= length else span for span in spans]


def _shared(draft: LM, spans: Sequence[int | None], sizes: Sizes) -> list[int]:
    """The group whose pages each layer of a draft model shares: the first, which sees most."""
    own, longest = _spans(draft, sizes.length), draft.config.longest()
    if longest < sizes.length:
        raise ModelError(
            f"the draft model has {longest} positions and sequences have up to {sizes.length}: "
            "lower max_length, or take another draft model"
        )
    if 0 in own:
        raise ModelError(
            "the draft model's recurrent layers cannot take back what they read: take one without"
        )
    if spans[0] is not None and any(span is None or span > spans[0] for span in own):
        raise ModelError(
            f"the draft model sees further than the {spans[0]} tokens that the model sees, whose "
            "pages it would share: take a draft model with a window as short"
        )
    return [0] * len(own)
