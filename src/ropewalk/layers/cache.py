"""What a layer remembers between calls: keys and values with their absolute positions, one slot a
sequence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Every key and value so far, stored at their position.

    keys and values [b, k, s, h]; positions int32 [b, s], -1 where nothing is stored.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array

    @classmethod
    def empty(cls, batch: int, length: int, kv_heads: int, head_dim: int, dtype: Any) -> "Dense":
        """A cache of `length` places for each of `batch` sequences."""
        shape = (batch, kv_heads, length, head_dim)
        return cls(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.full((batch, length), -1, jnp.int32),
        )

    def write(
        self, keys: jax.Array, values: jax.Array, positions: jax.Array, stored: jax.Array
    ) -> "Dense":
        """Adds keys and values [b, t, k, h] at positions [b, t]; where `stored` bool [b, t] is
        false, nothing is."""
        length = self.positions.shape[1]
        place = jnp.where(stored, positions, length)  # out of bounds: dropped
        row = jnp.arange(place.shape[0])[:, None]

        def put(buffer, new):
            return buffer.at[row, :, place].set(new.astype(buffer.dtype), mode="drop")

        return Dense(
            put(self.keys, keys),
            put(self.values, values),
            self.positions.at[row, place].set(positions, mode="drop"),
        )

    def read(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys and values [b, s, k, h] and their positions [b, s]."""
        return jnp.swapaxes(self.keys, 1, 2), jnp.swapaxes(self.values, 1, 2), self.positions
