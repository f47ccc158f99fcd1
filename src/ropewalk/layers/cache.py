"""What a layer remembers between calls, a slot a sequence. Masks come from the absolute positions
that stand beside what is remembered, never from where it lies."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ropewalk.ops import mask
from ropewalk.ops.attention import Attend, Block, paged, streamed
from ropewalk.ops.kernels import cpu
from ropewalk.parallel.axes import platform

Buffers = tuple[jax.Array, ...]
# What is stored of some tokens, each [b, s, k, h], as their keys and values.
Read = Callable[..., Buffers]
# The window and the chunk of a layer.
Near = tuple[int | None, int | None]

# Keys that attention over pages looks at together: enough to fill a product, few enough for a
# core's cache.
_TOGETHER = 128
# Queries of a sequence that make a step of decoding, with guesses or without.
_FEW = 8


def _as_stored(*buffers: jax.Array) -> Buffers:
    return buffers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Everything so far, each token at its position.

    buffers [b, k, s, h] each (keys and values, or one latent); positions int32 [b, s], -1 where
    nothing is stored.
    """

    buffers: Buffers
    positions: jax.Array

    @classmethod
    def empty(cls, batch: int, length: int, shapes: Sequence[tuple[int, int]], dtype: Any):
        """A cache of `length` places for each of `batch` sequences; `shapes` are heads and features
        of each buffer."""
        buffers = tuple(jnp.zeros((batch, k, length, h), dtype) for k, h in shapes)
        return cls(buffers, jnp.full((batch, length), -1, jnp.int32))

    @property
    def length(self) -> int:
        """How many tokens of a row there are places for."""
        return self.positions.shape[1]

    def attend(
        self,
        q: jax.Array,
        new: Sequence[jax.Array],
        positions: jax.Array,
        segment_ids: jax.Array,
        near: Near,
        attend: Attend,
        read: Read = _as_stored,
        **how: Any,
    ) -> tuple[jax.Array, "Dense"]:
        """Adds tokens and lets their queries q [b, t, n, h] look at all that they see: ([b, t, n,
        g], cache). `how` is what `attend` takes beside."""
        cache, buffers, there = self.extend(new, positions, segment_ids > 0)
        seen = mask.visible(positions, there, None, None, *near)
        return attend(q, *read(*buffers), seen, **how), cache

    def extend(
        self, new: Sequence[jax.Array], positions: jax.Array, stored: jax.Array
    ) -> tuple["Dense", Buffers, jax.Array]:
        """Adds tokens [b, t, k, h] at positions int32 [b, t]; where `stored` bool [b, t] is false,
        nothing is.

        Returns the cache, and what queries at these positions look at: buffers [b, s, k, h] and
        their positions int32 [b, s].
        """
        cache = self._put(new, positions, jnp.where(stored, positions, self.positions.shape[1]))
        return cache, cache.read(), cache.positions

    def read(self) -> Buffers:
        """What is stored, each [b, s, k, h]."""
        return tuple(jnp.swapaxes(buffer, 1, 2) for buffer in self.buffers)

    def _put(self, new: Sequence[jax.Array], positions: jax.Array, place: jax.Array):
        """Tokens at their places [b, t]; a place out of bounds is dropped."""
        row = jnp.arange(place.shape[0])[:, None]
        buffers = tuple(
            buffer.at[row, :, place].set(one.astype(buffer.dtype), mode="drop")
            for buffer, one in zip(self.buffers, new, strict=True)
        )
        kept = self.positions.at[row, place].set(positions, mode="drop")
        # A barrier, or XLA writes once for every reader, each time into a copy of the cache.
        buffers = jax.lax.optimization_barrier(buffers)
        return dataclasses.replace(self, buffers=buffers, positions=kept)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring(Dense):
    """The last tokens only, as many as a window or chunk lets a query see: position p lies at p
    modulo the length."""

    def extend(
        self, new: Sequence[jax.Array], positions: jax.Array, stored: jax.Array
    ) -> tuple["Dense", Buffers, jax.Array]:
        """As `Dense.extend`. Several tokens at once look at what was stored before beside each
        other, since the last of them take the places of what the first still see."""
        length = self.positions.shape[1]
        last = jnp.max(jnp.where(stored, positions, -1), axis=1, keepdims=True)
        kept = stored & (positions > last - length)
        cache = self._put(new, positions, jnp.where(kept, positions % length, length))
        if positions.shape[1] == 1:
            return cache, cache.read(), cache.positions
        beside = tuple(
            jnp.concatenate([old, one.astype(old.dtype)], axis=1)
            for old, one in zip(self.read(), new, strict=True)
        )
        there = jnp.where(stored, positions, -1)
        return cache, beside, jnp.concatenate([self.positions, there], axis=1)


def together_of(size: int) -> int:
    """How many pages of so many tokens are looked at in one go; the columns of a view are a
    multiple of it."""
    return max(1, _TOGETHER // size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Which pages the rows of a forward pass look at, and where their tokens go."""

    pages: jax.Array
    """int32 [b, m]"""
    there: jax.Array
    """int32 [b, m * size], the position of the token in each place; -1 where it is nobody's"""
    owner: jax.Array
    """int32 [b, m * size], the segment whose token it is"""
    place: jax.Array
    """int32 [b, t], page * size + offset of every new token; beyond the pool = nowhere"""
    count: jax.Array
    """int32 [], how many columns of `pages` are looked at, at least 1"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
    """Tokens in pages that a view gives to rows and segments, so that sequences share what begins
    alike and a row may hold several.

    buffers [p, k, size, h] each; of int8 ones, scales float32 [p, k, size] each.
    """

    buffers: Buffers
    scales: Buffers = ()
    view: View | None = None

    @classmethod
    def empty(cls, count: int, size: int, shapes: Sequence[tuple[int, int]], dtype: Any):
        """`count` pages of `size` tokens; `shapes` are heads and features of each buffer."""
        buffers = tuple(jnp.zeros((count, k, size, h), dtype) for k, h in shapes)
        narrow = jnp.dtype(dtype) == jnp.int8
        scales = tuple(jnp.ones((count, k, size), jnp.float32) for k, _ in shapes if narrow)
        return cls(buffers, scales)

    @property
    def size(self) -> int:
        """Tokens of a page."""
        return self.buffers[0].shape[2]

    @property
    def length(self) -> int:
        """How many tokens a row can look at."""
        return self.viewed.pages.shape[1] * self.size

    def attend(
        self,
        q: jax.Array,
        new: Sequence[jax.Array],
        positions: jax.Array,
        segment_ids: jax.Array,
        near: Near,
        attend: Attend,
        read: Read = _as_stored,
        **how: Any,
    ) -> tuple[jax.Array, "Paged"]:
        """As `Dense.attend`, with `streamed` or a CPU's kernel for `attend`: every page is read
        once, whatever the lengths."""
        cache, many, size = self._put(new), together_of(self.size), self.size
        view = self.viewed
        if q.shape[1] <= _FEW and read is _as_stored and cache._lies_for(q) and cpu.ready():
            seen, queries = (view.pages, view.there, view.owner), (positions, segment_ids)
            pools: Any = cache.buffers
            y = paged(q, pools, cache.scales, seen, queries, view.count, near, **how)
            return y, cache
        # Few narrow rows take a CPU longer than wide ones.
        dtype = jnp.float32 if platform() == "cpu" and q.shape[1] <= _FEW else q.dtype

        def block(i: jax.Array) -> Block:
            def cut(x: jax.Array, count: int) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, i * count, count, 1)

            k, v = (x.astype(dtype) for x in read(*cache._pages(cut(view.pages, many), q.dtype)))
            there, owner = (cut(x, many * size) for x in (view.there, view.owner))
            return k, v, mask.visible(positions, there, segment_ids, owner, *near)

        y = streamed(q.astype(dtype), block, -(-view.count // many), **how)
        return y.astype(q.dtype), cache

    @property
    def viewed(self) -> View:
        """The view of this forward pass. Raises ValueError without one."""
        if self.view is None:
            raise ValueError("a paged cache is looked at through a view; give it one")
        return self.view

    def _lies_for(self, q: jax.Array) -> bool:
        """Whether a kernel can read the pages for such queries where they lie."""
        kinds = {buffer.dtype for buffer in self.buffers}
        return q.dtype in (jnp.bfloat16, jnp.float32) and kinds in ({q.dtype}, {jnp.dtype("int8")})

    def _put(self, new: Sequence[jax.Array]) -> "Paged":
        page, place = jnp.divmod(self.viewed.place, self.size)
        rows = [x.astype(jnp.float32) if self.scales else x for x in new]
        # Of a token that is zero, too, something finite comes back.
        tops = [jnp.max(jnp.abs(x), axis=-1) for x in rows if self.scales]
        each = [jnp.where(top > 0, top / 127, 1.0) for top in tops]
        if self.scales:
            rows = [jnp.rint(x / s[..., None]) for x, s in zip(rows, each, strict=True)]

        def put(pool: jax.Array, x: jax.Array) -> jax.Array:
            return pool.at[page, :, place].set(x.astype(pool.dtype), mode="drop")

        buffers = tuple(map(put, self.buffers, rows))
        scales = tuple(map(put, self.scales, each))
        # A barrier, or XLA writes once for every reader, each time into a copy of the pool.
        buffers, scales = jax.lax.optimization_barrier((buffers, scales))
        return dataclasses.replace(self, buffers=buffers, scales=scales)

    def _pages(self, pages: jax.Array, dtype: Any) -> Buffers:
        """What lies on pages int32 [b, m], each [b, m * size, k, h]."""

        def taken(pool: jax.Array) -> jax.Array:
            found = jnp.swapaxes(pool[pages], 1, 2)  # [b, k, m, size, ...]
            return found.reshape(*found.shape[:2], -1, *found.shape[4:])

        found = [taken(pool).astype(dtype) for pool in self.buffers]
        if self.scales:
            each = zip(found, self.scales, strict=True)
            found = [(x * taken(scale)[..., None]).astype(dtype) for x, scale in each]
        return tuple(jnp.swapaxes(x, 1, 2) for x in found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recurrent:
    """What a recurrence carries: its state float32 [b, n, h_k, h_v], and the last inputs [b, width
    - 1, features] of a short convolution before it."""

    state: jax.Array
    inputs: jax.Array
