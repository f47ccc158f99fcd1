"""What the programs of serving compute, as functions to be compiled: no call to a device here."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ropewalk.layers.cache import Paged, Recurrent, View, together_of
from ropewalk.layers.lm import LM, with_parameters
from ropewalk.ops.sample import best, logprob
from ropewalk.serve import slots as slots_
from ropewalk.serve.lookup import lookup
from ropewalk.serve.sizes import Sizes
from ropewalk.serve.slots import MOST_RANKED, Chosen, Slots, Written

# Tokens whose logits a prefill with scores holds at a time.
_SCORED = 64
EVERY = np.uint32(2**32 - 1)
"""bits of a word of tokens that may all be written"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that lives on the device between calls; every program takes it over."""

    caches: list[Paged | Recurrent]
    """of every layer of the model, then of every layer of the model that guesses ahead"""
    slots: Slots
    written: Written


Scores = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Programs:
    """Of a model's structure, and of that of a smaller one that guesses ahead, if there is one.

    Their weights are handed in as a list, (model, draft) or (model,).
    """

    structure: LM
    draft: LM | None
    sizes: Sizes
    spans: tuple[int | None, ...]
    """of each group of layers with pages, how many of the last keys a query sees; None for all"""
    groups: list[int | None]
    """of each layer as in State.caches, its group; None for a recurrent one"""

    def make(self, dtypes: Any) -> State:
        """Empty pages for layers of these dtypes, and slots that are all done."""
        sizes, caches = self.sizes, []
        layers = [*self.structure.layers.blocks()]
        layers += [] if self.draft is None else self.draft.layers.blocks()
        for group, block, dtype in zip(self.groups, layers, dtypes, strict=True):
            if group is None:
                caches.append(block.attention.init_cache(sizes.slots, 1, dtype))
            else:
                kept = sizes.cache or dtype
                caches.append(block.attention.init_pages(sizes.pages[group], sizes.page, kept))
        vocab = self.structure.config.vocab_size
        counts = jnp.zeros((sizes.slots, vocab), jnp.int32)
        tokens = jnp.zeros((sizes.slots, sizes.length), jnp.int32) if sizes.drafts else None
        return State(caches, slots_.empty(sizes.slots, vocab), Written(counts, tokens))

    def read(self, weights, state: State, tokens, views, ends, carries, following):
        """Reads the segments of a Packed: (State, (final hidden states [p, d] of their last tokens,
        sums float32 [p, d] of those of all), what recurrent layers know then, Scores or None)."""
        model = with_parameters(self.structure, weights[0])
        segments, positions = tokens[1:2], tokens[2:3]
        caches = self._viewed(state.caches, views, together(carries))
        own, guessing = self._split(caches)
        x, own, _ = model.hidden(tokens[:1], positions, segments, own)
        if self.draft is not None:
            draft = with_parameters(self.draft, weights[1])
            ids = jnp.minimum(tokens[:1], self.draft.config.vocab_size - 1)
            _, guessing, _ = draft.hidden(ids, positions, segments, guessing)
        caches = [*own, *guessing]
        scores = None if following is None else _scored(model, x[0], following)
        kept = [caches[layer] for layer in self.recurrents()]
        after = [jax.tree.map(lambda c, i=i: c[i : i + 1], kept) for i in range(self.sizes.pack)]
        mine = segments == 1 + jnp.arange(self.sizes.pack)[:, None]
        sums = mine.astype(jnp.float32) @ x[0].astype(jnp.float32)
        state = dataclasses.replace(state, caches=self._closed(caches, state.caches))
        return state, (x[0, ends], sums), after, scores

    def begin(
        self, weights, state: State, hidden, which, carries, slot, new: Slots, bits, constrained
    ) -> tuple[State, Chosen]:
        """Puts rows `new` into slots, each with its first token by `hidden[which]`."""
        model = with_parameters(self.structure, weights[0])
        logits = model.unembed(hidden[which])
        chosen = self._chosen(logits, new, state.written, slot, bits, constrained)
        caches = list(state.caches)
        for layer, one in zip(self.recurrents(), together(carries), strict=True):
            caches[layer] = jax.tree.map(
                lambda all_, x: all_.at[slot].set(x, mode="drop"), caches[layer], one
            )
        new, written = slots_.moved(new, state.written, slot, chosen, 0)
        return State(caches, state.slots.put(slot, new), written), chosen

    def write(self, weights, state: State, slot, tables, bits, constrained) -> tuple[State, Chosen]:
        """The next tokens [lookahead, b] of slots int32 [b]; beyond the last slot is nobody's."""
        model = with_parameters(self.structure, weights[0])

        def step(state: State, _: Any) -> tuple[State, Chosen]:
            own = state.slots.take(slot)
            live = (slot < self.sizes.slots) & ~own.done
            state, drafts = self._drafted(weights, state, slot, own, live, tables)
            tokens = jnp.concatenate([own.token[:, None], drafts], axis=1)
            positions = own.position[:, None] + jnp.arange(tokens.shape[1])
            there = live[:, None] & self._within(own, positions)
            views = [self._view(g, tables[g], positions, there) for g in range(len(self.spans))]
            given = [jax.tree.map(lambda x: x[slot], state.caches[i]) for i in self.recurrents()]
            read, guessing = self._split(self._viewed(state.caches, views, given))
            here = jnp.maximum(tokens, 0), positions, there.astype(jnp.int32)
            logits, read, _ = model(*here, read)
            closed = self._closed([*read, *guessing], state.caches, slot)
            state = dataclasses.replace(state, caches=closed)
            return self._kept(state, own, slot, live, logits, drafts, bits, constrained)

        state, chosen = jax.lax.scan(step, state, None, length=self.sizes.steps)
        return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), chosen)

    def told(self, state: State, slot, counts, tokens) -> State:
        """With other rows of `Written` for a slot."""
        written = state.written
        all_ = None if written.tokens is None else written.tokens.at[slot].set(tokens)
        new = Written(written.counts.at[slot].set(counts), all_)
        return dataclasses.replace(state, written=new)

    def copied(self, group: int, state: State, source: jax.Array, target: jax.Array) -> State:
        """With a page of a group copied onto another one."""
        caches = [
            jax.tree.map(lambda pool: pool.at[target].set(pool[source]), cache)
            if own == group
            else cache
            for cache, own in zip(state.caches, self.groups, strict=True)
        ]
        return dataclasses.replace(state, caches=caches)

    def columns(self, blocks: int) -> int:
        """Columns of a view for so many pages: a multiple of what is looked at together."""
        many = together_of(self.sizes.page)
        return -(-blocks // many) * many

    def recurrents(self) -> list[int]:
        """The layers without pages."""
        return [layer for layer, group in enumerate(self.groups) if group is None]

    # Parts of programs.

    def _drafted(self, weights, state: State, slot, own: Slots, live, tables):
        """Tokens int32 [b, drafts] that may follow, -1 where there is no guess; and the State after
        the draft model has read all but the last."""
        count, tokens = self.sizes.drafts, state.written.tokens
        if tokens is None:
            return state, jnp.zeros((slot.shape[0], 0), jnp.int32)
        tokens = tokens[slot]
        if self.draft is None:
            return state, lookup(tokens, own.position, count)
        model, vocab = with_parameters(self.draft, weights[1]), self.structure.config.vocab_size
        own_caches, caches = self._split(state.caches)
        known, open_ = self.draft.config.vocab_size, jnp.full((1, -(-vocab // 32)), EVERY)

        def guess(caches, ids, ahead):
            positions = own.position[:, None] + ahead + jnp.arange(1 - ids.shape[1], 1)
            there = live[:, None] & self._within(own, positions)
            view = self._view(0, tables[0], positions, there)
            viewed = [dataclasses.replace(cache, view=view) for cache in caches]
            ids = jnp.minimum(ids, known - 1)
            x, viewed, _ = model.hidden(ids, positions, there.astype(jnp.int32), viewed)
            logits = model.unembed(x[:, -1])[:, :vocab]
            missing = ((0, 0), (0, max(vocab - known, 0)))
            logits = jnp.pad(logits, missing, constant_values=-1e30)
            at = dataclasses.replace(own, count=own.count + ahead)
            bits = jnp.broadcast_to(open_, (slot.shape[0], open_.shape[1]))
            chosen = self._chosen(logits, at, state.written, slot, bits, jnp.bool(False))
            return [dataclasses.replace(cache, view=None) for cache in viewed], chosen.token

        # The token before, too: the last of the guesses was never read, and may have been right.
        before = jnp.take_along_axis(tokens, own.position[:, None] - 1, axis=1)
        pair = jnp.concatenate([before, own.token[:, None]], axis=1)
        caches, first = guess(caches, pair, 0)

        def further(carry, ahead):
            caches, token = guess(carry[0], carry[1][:, None], ahead)
            return (caches, token), token

        ahead = jnp.arange(1, count)
        (caches, _), rest = jax.lax.scan(further, (caches, first), ahead)
        drafts = jnp.concatenate([first[None], rest]).T
        return dataclasses.replace(state, caches=[*own_caches, *caches]), drafts

    def _kept(self, state, own: Slots, slot, live, logits, drafts, bits, constrained):
        """The tokens that slots write by logits [b, 1 + drafts, v]: each draws them one after the
        other, as it would without guesses, as long as the one drawn is the one guessed."""
        # Of a grammar the first token's bits are known only.
        free = ~constrained | jnp.all(bits == EVERY, axis=1)
        before, following = own, jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=-1)

        def pick(carry, each):
            own, written, on = carry
            chosen = self._chosen(each[0], own, written, slot, bits, constrained)
            chosen = dataclasses.replace(chosen, emitted=on)
            own, written = slots_.moved(own, written, slot, chosen, 1)
            on = on & ~own.done & free & (chosen.token == each[1])
            return (own, written, on), chosen

        each = jnp.swapaxes(logits, 0, 1), following.T
        (own, written, _), chosen = jax.lax.scan(pick, (own, state.written, live), each)
        guessed = jnp.pad(drafts, ((0, 0), (1, 0)), constant_values=-1).T >= 0
        within = before.count + jnp.arange(len(guessed))[:, None] < before.limit
        chosen = dataclasses.replace(chosen, guessed=guessed & within & live & free)
        return State(state.caches, state.slots.put(slot, own), written), chosen

    def _chosen(self, logits, own: Slots, written: Written, slot, bits, constrained) -> Chosen:
        at = jnp.minimum(slot, self.sizes.slots - 1)
        return slots_.choose(logits, own, written.counts, at, bits, constrained)

    def _within(self, own: Slots, positions: jax.Array) -> jax.Array:
        """Whether a token at positions [b, t] is followed by one that its slot may still write; for
        others there may be no page."""
        return positions < (own.position + own.limit - own.count)[:, None]

    def _split(self, caches: list[Any]) -> tuple[list[Any], list[Any]]:
        """The caches of the model, and those of the one that guesses."""
        count = len(self.groups)
        if self.draft is not None:
            count -= sum(1 for _ in self.draft.layers.blocks())
        return caches[:count], caches[count:]

    def _view(self, group: int, pages: jax.Array, positions: jax.Array, there: jax.Array) -> View:
        """What tokens at positions [b, t] of each row's sequence look at, all or their last span;
        those that are not `there` bool [b, t] are not kept."""
        size, span, most = self.sizes.page, self.spans[group], pages.shape[1]
        t, live = positions.shape[1], jnp.any(there, axis=1)
        block = jnp.minimum(positions // size, most - 1)
        place = jnp.take_along_axis(pages, block, axis=1) * size + positions % size
        column = jnp.broadcast_to(jnp.arange(most, dtype=jnp.int32), pages.shape)
        if span is not None:
            seen = min(most, self.columns((span + t - 2) // size + 2))
            start = jnp.maximum(positions[:, :1] - span + 1, 0) // size
            column = start + jnp.arange(seen, dtype=jnp.int32)
            pages = jnp.take_along_axis(pages, jnp.minimum(column, most - 1), axis=1)
        at = column[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)
        at = jnp.where((live[:, None] & (column < most))[:, :, None], at, -1)
        at = at.reshape(at.shape[0], -1)
        used = positions[:, -1] // size - column[:, 0] + 1
        count = jnp.minimum(jnp.max(jnp.where(live, used, 1)), pages.shape[1])
        place = jnp.where(there, place, self.sizes.pages[group] * size)
        return View(pages, at, jnp.ones_like(at), place, count)

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


def together(carries: Any) -> list[Recurrent]:
    """What each recurrent layer knows of several sequences, a row each."""
    return [
        jax.tree.map(lambda *each: jnp.concatenate(each), *one)
        for one in zip(*carries, strict=True)
    ]


def _scored(model: LM, x: jax.Array, following: jax.Array) -> Scores:
    """Scores of `Prefix` for hidden states [t, d] and the tokens [t] after them."""

    def tile(part: tuple[jax.Array, jax.Array]) -> Scores:
        logits = model.unembed(part[0])
        return logprob(logits, part[1]), *best(logits, MOST_RANKED)

    size = math.gcd(x.shape[0], _SCORED)
    tiles = x.reshape(-1, size, x.shape[1]), following.reshape(-1, size)
    scores = jax.lax.map(tile, tiles)
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), scores)
