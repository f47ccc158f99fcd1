"""Products of activations with parameters, shaped for the platform they run on."""

import math

import jax
import jax.numpy as jnp

from ropewalk.parallel.axes import platform


def project(x: jax.Array, weight: jax.Array, contract: int = 1) -> jax.Array:
    """Contracts the last `contract` dims of x with the first ones of weight: [..., in] x [in, out]
    -> [..., out].

    Accumulates in float32 and returns x's dtype. On a CPU the leading dims are flattened around the
    product: XLA's weight gradient over two contracted dims is ten times slower there. Elsewhere
    they stay, so that a sharded time dim does.
    """
    inner, outer = weight.shape[:contract], weight.shape[contract:]
    leading = x.shape[: x.ndim - contract]
    if platform() != "cpu":
        dims = (tuple(range(len(leading), x.ndim)), tuple(range(contract)))
        return jax.lax.dot_general(x, weight.astype(x.dtype), (dims, ((), ())))
    flat = x.reshape(math.prod(leading), math.prod(inner))
    product = _rows(flat, weight.reshape(math.prod(inner), math.prod(outer)).astype(x.dtype))
    return product.reshape(*leading, *outer)


def _rows(x: jax.Array, weight: jax.Array) -> jax.Array:
    """[m, in] x [in, out] on a CPU; a lone bfloat16 row is padded to two, which run ten times
    faster."""
    if x.shape[0] == 1 and x.dtype == jnp.bfloat16:
        return (jnp.concatenate([x, x]) @ weight)[:1]
    return x @ weight
