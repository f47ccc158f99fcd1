"""Scaled dot-product attention: one reference in plain JAX, and the library's kernels behind the
same signature."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ropewalk.core.errors import LayoutError

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, float], jax.Array]

# Large enough to vanish in a softmax, small enough that a row of nothing else stays finite.
_MASKED = -1e30


def reference(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float) -> jax.Array:
    """softmax(q k^T * scale) v with the softmax in float32; queries share keys in groups of n / k.

    q [b,t,n,h], k and v [b,s,k,h], seen bool [b,t,s] -> [b,t,n,h]. A query that sees nothing gets a
    finite value.
    """
    b, t, n, h = q.shape
    kv = k.shape[2]
    grouped = q.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(seen[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)


def library(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float) -> jax.Array:
    """`jax.nn.dot_product_attention`, which picks cuDNN's kernel where it applies; shapes as
    `reference`."""
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=scale)


IMPLEMENTATIONS: dict[str, Attend] = {"reference": reference, "library": library}


def choose(name: str, platform: str) -> tuple[str, Attend]:
    """The implementation a layout asks for; `auto` takes the library's on a GPU and the reference
    elsewhere."""
    if name == "auto":
        name = "library" if platform == "gpu" else "reference"
    if name not in IMPLEMENTATIONS:
        raise LayoutError(f"layout.attention = {name}: use auto, {', '.join(IMPLEMENTATIONS)}")
    return name, IMPLEMENTATIONS[name]
