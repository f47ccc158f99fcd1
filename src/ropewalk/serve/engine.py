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
from ropewalk.layers.cache import Paged, Recurrent, View, together_of
from ropewalk.layers.decode import mesh_of, ready
from ropewalk.layers.lm import LM, parameters, table, with_parameters
from ropewalk.ops.sample import best, logprob
from ropewalk.serve import slots as slots_
from ropewalk.serve.packed import Packed, Segment
from ropewalk.serve.slots import MOST_RANKED, Chosen, Settings, Slots

# The shortest prefill; longer ones are padded to powers of two from here on.
_SHORTEST = 16
# Tokens whose logits a prefill with scores holds at a time.
_SCORED = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the programs are compiled for."""

    slots: int = 8
    length: int = 2048
    """most tokens of a sequence"""
    page: int = 32
    """tokens of a page"""
    pages: tuple[int, ...] = ()
    """of each group; by default enough for every slot at its longest"""
    chunk: int = 256
    """most tokens of one prefill"""
    pack: int = 4
    """most sequences of one prefill"""
    steps: int = 1
    """tokens that `generate` writes in one call"""
    cache: str | None = None
    """dtype of the cached keys and values; by default that of the model, int8 for quantized"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that lives on the device between calls; every program takes it over."""

    caches: list[Paged | Recurrent]
    slots: Slots
    counts: jax.Array
    """int32 [s, v], of `slots.choose`"""


Scores = tuple[jax.Array, jax.Array, jax.Array]


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

    def __init__(self, model: LM, sizes: Sizes | None = None):
        """Takes over `model`, a concrete module. Raises ModelError for sizes that cannot be."""
        sizes = sizes or Sizes()
        self.mesh = mesh_of(model)
        self._axes = _kv_axes(model)
        model = ready(model)
        self.vocab = model.config.vocab_size
        self._weights = parameters(model)
        self._structure = jax.eval_shape(lambda: model)
        spans = [block.attention.span for block in self._structure.layers.blocks()]
        spans = [None if span is not None and span >= sizes.length else span for span in spans]
        self.spans = tuple(sorted({s for s in spans if s != 0}, key=lambda s: (s is not None, s)))
        self.recurrent = 0 in spans
        self.groups = [None if span == 0 else self.spans.index(span) for span in spans]
        self.sizes = self._checked(sizes)
        self.blocks = math.ceil(self.sizes.length / self.sizes.page)
        self._zero = self._carry()
        self._compile()

    def _checked(self, sizes: Sizes) -> Sizes:
        longest = self._structure.config.longest()
        if not 1 <= sizes.length <= longest:
            raise ModelError(
                f"sequences of {sizes.length} tokens are asked for; the model has {longest} "
                "positions: lower max_length"
            )
        blocks = math.ceil(sizes.length / sizes.page)
        held = [
            blocks if span is None else min(blocks, (span + sizes.chunk) // sizes.page + 2)
            for span in self.spans
        ]
        pages = sizes.pages or tuple(sizes.slots * each for each in held)
        for count, least in zip(pages, held, strict=True):
            if count < least:
                raise ModelError(
                    f"{count} pages of {sizes.page} tokens cannot hold one sequence of "
                    f"{sizes.length}, which has {least}: give more memory, or lower max_length"
                )
        return dataclasses.replace(sizes, pages=pages)

    @property
    def width(self) -> int:
        """Most pages that the segments of one prefill look at together, in any group."""
        return self.blocks + 2 * self.sizes.pack

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
        """The next tokens of some slots, [steps, b] each, padded to a power of two of rows.

        Their pages must have room for `steps` more tokens.
        """
        many = self.rows(len(rows))
        slot = np.full(many, self.sizes.slots, np.int32)
        slot[: len(rows)] = [row.slot for row in rows]
        tables = [np.zeros((many, self.columns(self.blocks)), np.int32) for _ in self.spans]
        for place, row in enumerate(rows):
            for held, own in zip(tables, row.tables, strict=True):
                held[place, : len(own)] = own
        return self._generate(self._weights, state, slot, tuple(tables), *self._bits(bits, many))

    def count(
        self, state: State, slot: int, prompt: Sequence[int], written: Sequence[int]
    ) -> State:
        """Tells a slot that is about to be inserted what penalties go by."""
        row = np.zeros(self.vocab, np.int32)
        row[np.unique(np.asarray(prompt, np.int64))] += slots_.PROMPTED
        np.add.at(row, np.asarray(written, np.int64), 1)
        return self._count(state, slot, row)

    def copy(self, state: State, group: int, source: int, target: int) -> State:
        """Copies a page, for a sequence that goes on from where another one shares it."""
        return self._copy[group](state, source, target)

    def warm(self) -> Iterator[tuple[int, int]]:
        """Compiles every program that serving runs, and tells after each how many of how many."""
        state, tables = self.init_decode_state(), [[0] * self.blocks for _ in self.spans]
        read = [(length, False) for length in self.lengths()] + [(self.sizes.chunk, True)]
        many = sorted({self.rows(n + 1) for n in range(self.sizes.slots)})
        total, done = len(read) + len(many) + 2, 0
        state = self.count(state, 0, [0], [])
        yield (done := done + 1), total
        for length, scored in reversed(read):
            segment = Segment([0] * min(length, self.sizes.length), 0, tables)
            state, prefix = self.prefill(state, [segment], scored)
            yield (done := done + 1), total
            if length == _SHORTEST:
                state, _ = self.insert(state, prefix, [(0, 0, Settings(limit=1))])
                yield (done := done + 1), total
        for count in many:
            state, _ = self.generate(state, [Row(slot, tables) for slot in range(count)])
            yield (done := done + 1), total

    def programs(self) -> int:
        """How many programs were compiled so far."""
        made: list[Any] = [self._prefill, self._insert, self._generate, self._count, *self._copy]
        return sum(program._cache_size() for program in made)

    def rows(self, count: int) -> int:
        """The number of rows that `count` slots are padded to."""
        return min(self.sizes.slots, 1 << (count - 1).bit_length())

    def lengths(self) -> list[int]:
        """The lengths that prefills are padded to."""
        sizes = [_SHORTEST]
        while sizes[-1] < self.sizes.chunk:
            sizes.append(min(2 * sizes[-1], self.sizes.chunk))
        return sizes

    # Programs.

    def _compile(self) -> None:
        state = self._shardings()
        whole = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        self._init = jax.jit(self._make, out_shardings=state)
        donate = functools.partial(jax.jit, donate_argnums=1)
        self._prefill = donate(self._read, out_shardings=(state, whole, whole, whole))
        self._insert = donate(self._begin, out_shardings=(state, whole))
        self._generate = donate(self._write, out_shardings=(state, whole))
        first = functools.partial(jax.jit, donate_argnums=0, out_shardings=state)
        self._count = first(
            lambda state, slot, row: dataclasses.replace(
                state, counts=state.counts.at[slot].set(row)
            )
        )
        self._copy = [first(functools.partial(self._copied, g)) for g in range(len(self.spans))]

    def _make(self) -> State:
        caches = []
        for group, block in zip(self.groups, self._structure.layers.blocks(), strict=True):
            if group is None:
                caches.append(block.attention.init_cache(self.sizes.slots, 1, self._dtype))
            else:
                kept = self.sizes.cache or self._dtype
                pages = self.sizes.pages[group]
                caches.append(block.attention.init_pages(pages, self.sizes.page, kept))
        slots = slots_.empty(self.sizes.slots, self.vocab)
        return State(caches, slots, jnp.zeros((self.sizes.slots, self.vocab), jnp.int32))

    def _read(self, weights, state, tokens, views, ends, carries, following):
        model = with_parameters(self._structure, weights)
        segments, positions = tokens[1:2], tokens[2:3]
        caches = self._viewed(state.caches, views, _together(carries))
        x, caches, _ = model.hidden(tokens[:1], positions, segments, caches)
        scores = None if following is None else _scored(model, x[0], following)
        kept = [caches[layer] for layer in self._recurrents()]
        after = [jax.tree.map(lambda c, i=i: c[i : i + 1], kept) for i in range(self.sizes.pack)]
        own = segments == 1 + jnp.arange(self.sizes.pack)[:, None]
        sums = own.astype(jnp.float32) @ x[0].astype(jnp.float32)
        state = dataclasses.replace(state, caches=self._closed(caches, state.caches))
        return state, (x[0, ends], sums), after, scores

    def _begin(self, weights, state, hidden, which, carries, slot, new, bits, constrained):
        model = with_parameters(self._structure, weights)
        logits = model.unembed(hidden[which])
        chosen = self._chosen(logits, new, state.counts, slot, bits, constrained)
        caches = list(state.caches)
        for layer, one in zip(self._recurrents(), _together(carries), strict=True):
            caches[layer] = jax.tree.map(
                lambda all_, x: all_.at[slot].set(x, mode="drop"), caches[layer], one
            )
        new, counts = self._moved(new, state.counts, slot, chosen, jnp.int32(0))
        return State(caches, state.slots.put(slot, new), counts), chosen

    def _write(self, weights, state, slot, tables, bits, constrained):
        model = with_parameters(self._structure, weights)

        def step(state: State, _: Any) -> tuple[State, Chosen]:
            own = state.slots.take(slot)
            live = (slot < self.sizes.slots) & ~own.done
            views = [self._view(g, tables[g], own.position[:, None], live) for g in self._groups()]
            given = [jax.tree.map(lambda x: x[slot], state.caches[i]) for i in self._recurrents()]
            caches = self._viewed(state.caches, views, given)
            here = own.token[:, None], own.position[:, None], live[:, None].astype(jnp.int32)
            logits, caches, _ = model(*here, caches)
            chosen = self._chosen(logits[:, 0], own, state.counts, slot, bits, constrained)
            chosen = dataclasses.replace(chosen, emitted=live)
            new, counts = self._moved(own, state.counts, slot, chosen, jnp.int32(1))
            closed = self._closed(caches, state.caches, slot)
            return State(closed, state.slots.put(slot, new), counts), chosen

        return jax.lax.scan(step, state, None, length=self.sizes.steps)

    def _copied(self, group: int, state: State, source: jax.Array, target: jax.Array) -> State:
        caches = [
            jax.tree.map(lambda pool: pool.at[target].set(pool[source]), cache)
            if own == group
            else cache
            for cache, own in zip(state.caches, self.groups, strict=True)
        ]
        return dataclasses.replace(state, caches=caches)

    # Parts of programs.

    def _chosen(self, logits, own, counts, slot, bits, constrained) -> Chosen:
        at = jnp.minimum(slot, self.sizes.slots - 1)
        return slots_.choose(logits, own, counts, at, bits, constrained)

    def _moved(self, own: Slots, counts, slot, chosen: Chosen, by: jax.Array):
        """Slots after a token was chosen, `by` positions on, and the counts."""
        token, count = chosen.token, own.count + chosen.emitted
        stopped = jnp.any(own.stops == token[:, None], axis=1) | (count >= own.limit)
        counts = counts.at[slot, token].add(chosen.emitted, mode="drop")
        new = dataclasses.replace(
            own,
            token=token,
            position=own.position + by * chosen.emitted,
            count=count,
            done=own.done | stopped,
        )
        return new, counts

    def _view(self, group: int, pages: jax.Array, positions: jax.Array, live: jax.Array) -> View:
        """What tokens at positions [b, t] of each row's sequence look at: all, or its last span."""
        size, span, most = self.sizes.page, self.spans[group], pages.shape[1]
        t = positions.shape[1]
        block = jnp.minimum(positions // size, most - 1)
        place = jnp.take_along_axis(pages, block, axis=1) * size + positions % size
        column = jnp.broadcast_to(jnp.arange(most, dtype=jnp.int32), pages.shape)
        if span is not None:
            seen = min(most, self.columns((span + t - 2) // size + 2))
            start = jnp.maximum(positions[:, :1] - span + 1, 0) // size
            column = start + jnp.arange(seen, dtype=jnp.int32)
            pages = jnp.take_along_axis(pages, jnp.minimum(column, most - 1), axis=1)
        there = column[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)
        there = jnp.where((live[:, None] & (column < most))[:, :, None], there, -1)
        there = there.reshape(there.shape[0], -1)
        used = positions[:, -1] // size - column[:, 0] + 1
        count = jnp.max(jnp.where(live, used, 1))
        nowhere = self.sizes.pages[group] * size
        place = jnp.where(live[:, None], place, nowhere)
        return View(pages, there, jnp.ones_like(there), place, count)

    def _viewed(self, caches, views, given) -> list[Any]:
        """Caches for one forward pass: pages with their views, and the rows of recurrent ones."""
        given = iter(given)
        return [
            next(given) if group is None else dataclasses.replace(cache, view=views[group])
            for cache, group in zip(caches, self.groups, strict=True)
        ]

    def _closed(self, caches, before, slot=None) -> list[Any]:
        """Caches after a forward pass: pages without views; of recurrent ones the rows of slots
        are put back, and without slots they are as before."""

        def one(cache, old, group):
            if group is not None:
                return dataclasses.replace(cache, view=None)
            if slot is None:
                return old
            return jax.tree.map(lambda all_, x: all_.at[slot].set(x, mode="drop"), old, cache)

        return [one(*each) for each in zip(caches, before, self.groups, strict=True)]

    # Small things.

    @property
    def _dtype(self) -> Any:
        return self._weights["embed.weight"].dtype

    def _groups(self) -> range:
        return range(len(self.spans))

    def _recurrents(self) -> list[int]:
        return [layer for layer, group in enumerate(self.groups) if group is None]

    def columns(self, blocks: int) -> int:
        """Columns of a view for so many pages: a multiple of what is looked at together."""
        together = together_of(self.sizes.page)
        return -(-blocks // together) * together

    def _carry(self) -> list[Any]:
        """What recurrent layers know before the first token."""
        blocks = list(self._structure.layers.blocks())
        return [blocks[i].attention.init_cache(1, 1, self._dtype) for i in self._recurrents()]

    @functools.cached_property
    def _everything(self) -> dict[int, jax.Array]:
        words = -(-self.vocab // 32)
        counts = {self.sizes.pack, *(self.rows(n + 1) for n in range(self.sizes.slots))}
        return {count: jnp.full((count, words), 2**32 - 1, jnp.uint32) for count in counts}

    def _bits(self, bits: np.ndarray | None, count: int) -> tuple[Any, np.bool]:
        if bits is None:
            return self._everything[count], np.False_
        rest = np.repeat(bits[:1], count - len(bits), axis=0)
        return np.concatenate([bits, rest]), np.True_

    def _shardings(self) -> State | None:
        """Pools [p, k, size, ...] lie as the heads of keys do; everything else on every device."""
        if self.mesh is None:
            return None
        whole = NamedSharding(self.mesh, PartitionSpec())
        ways = math.prod(self.mesh.shape[name] for name in self._axes)
        split = NamedSharding(self.mesh, PartitionSpec(None, self._axes))
        state = jax.eval_shape(self._make)
        caches = [
            jax.tree.map(
                lambda pool, own=group: whole if own is None or pool.shape[1] % ways else split,
                cache,
            )
            for cache, group in zip(state.caches, self.groups, strict=True)
        ]
        rest = jax.tree.map(lambda _: whole, state)
        return dataclasses.replace(rest, caches=caches)


def _together(carries: Sequence[list[Recurrent]]) -> list[Recurrent]:
    """What each recurrent layer knows of several sequences, a row each."""
    return [
        jax.tree.map(lambda *each: jnp.concatenate(each), *one)
        for one in zip(*carries, strict=True)
    ]


def _kv_axes(model: LM) -> tuple[str, ...]:
    """The mesh axes over which the heads of keys lie, as they do in the weights."""
    values = parameters(model)
    for path, spec in table(model).items():
        sharding = values[path].sharding
        if "kv_heads" in spec.axes and isinstance(sharding, NamedSharding):
            names = [*sharding.spec, *[None] * len(spec.axes)][spec.axes.index("kv_heads")]
            return () if names is None else (names,) if isinstance(names, str) else tuple(names)
    return ()


def _scored(model: LM, x: jax.Array, following: jax.Array) -> Scores:
    """Scores of `Prefix` for hidden states [t, d] and the tokens [t] after them."""

    def tile(part: tuple[jax.Array, jax.Array]) -> Scores:
        logits = model.unembed(part[0])
        return logprob(logits, part[1]), *best(logits, MOST_RANKED)

    size = math.gcd(x.shape[0], _SCORED)
    tiles = x.reshape(-1, size, x.shape[1]), following.reshape(-1, size)
    scores = jax.lax.map(tile, tiles)
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), scores)
