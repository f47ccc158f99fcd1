"""What a layer remembers between calls, a slot a sequence. Masks come from the absolute positions
that stand beside what is remembered, never from where it lies."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Buffers = tuple[jax.Array, ...]


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recurrent:
    """What a recurrence carries: its state float32 [b, n, h_k, h_v], and the last inputs [b, width
    - 1, features] of a short convolution before it."""

    state: jax.Array
    inputs: jax.Array
