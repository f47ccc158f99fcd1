"""Token embedding, and its use as an output head."""

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.layers.linear import INIT_STD


class Embedding(nnx.Module):
    """A table of one row a token id (or of what `axis` names), [v, d]."""

    def __init__(self, rows: int, size: int, axis: str = "vocab", *, rngs: nnx.Rngs):
        value = INIT_STD * jax.random.normal(rngs.params(), (rows, size), jnp.float32)
        self.dtype: str | None = None
        self.weight = nnx.Param(value, axes=(axis, "embed"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [b, t] -> [b, t, d] in `dtype`, or as the table is stored; it is what the layers
        after it compute in. A row that the table lacks is not a number."""
        rows = jnp.take(self.weight[...], tokens, axis=0)
        return rows if self.dtype is None else rows.astype(self.dtype)
