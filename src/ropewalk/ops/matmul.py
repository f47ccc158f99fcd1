"""Products of activations with parameters, shaped for the platform they run on."""

import math

import jax
import jax.numpy as jnp

from ropewalk.ops.kernels import cpu
from ropewalk.parallel.axes import platform


def project(x: jax.Array, weight: jax.Array, contract: int = 1) -> jax.Array:
    """Contracts the last `contract` dims of x with the first ones of weight.

    [..., in] x [in, out] -> [..., out]; accumulates in float32 and returns x's dtype. On a CPU the
    leading dims are flattened around the product: XLA's weight gradient over two contracted dims
    is ten times slower there. Elsewhere they stay, so that a sharded time dim does.
    """
    inner, outer = weight.shape[:contract], weight.shape[contract:]
    leading = x.shape[: x.ndim - contract]
    weight = weight.astype(x.dtype)
    if platform() != "cpu":
        dims = (tuple(range(len(leading), x.ndim)), tuple(range(contract)))
        return jax.lax.dot_general(x, weight, (dims, ((), ())))
    flat = x.reshape(math.prod(leading), math.prod(inner))
    product = _rows(flat, weight.reshape(math.prod(inner), math.prod(outer)))
    return product.reshape(*leading, *outer)


def project_rows(x: jax.Array, weight: jax.Array, contract: int = 1) -> jax.Array:
    """As `project` with the weight's dims the other way round: [..., in] x [out, in] -> [..., out].

    Few rows of bfloat16 on a CPU read such a weight three times as fast.
    """
    first = weight.ndim - contract
    outer, inner = weight.shape[:first], weight.shape[first:]
    leading = x.shape[: x.ndim - contract]
    weight = weight.astype(x.dtype)
    if platform() != "cpu":
        dims = (tuple(range(len(leading), x.ndim)), tuple(range(first, weight.ndim)))
        return jax.lax.dot_general(x, weight, (dims, ((), ())))
    flat = x.reshape(math.prod(leading), math.prod(inner))
    table = weight.reshape(math.prod(outer), math.prod(inner))
    if flat.dtype == jnp.bfloat16 and flat.shape[0] <= cpu.MOST_ROWS and cpu.ready():
        return cpu.rows(flat, table).reshape(*leading, *outer)
    rows = jnp.concatenate([flat, flat]) if _lonely(flat) else flat
    product = jax.lax.dot_general(rows, table, (((1,), (1,)), ((), ())))
    return product[: flat.shape[0]].reshape(*leading, *outer)


def transposed(x: jax.Array) -> jax.Array:
    """x with its last two dims swapped, as a copy that XLA may not fold back into a product.

    XLA's products on a CPU are up to five times faster row by column than along first dims, and it
    widens to float32 any whose operand is not row-major when it looks. A matrix copied through a
    flat array always is; of several in a batch, that copy costs more than it saves.
    """
    swapped = jnp.swapaxes(x, -1, -2)
    if x.ndim > 2:
        return jax.lax.optimization_barrier(swapped)
    return jax.lax.optimization_barrier(swapped.reshape(-1)).reshape(swapped.shape)


def _rows(x: jax.Array, weight: jax.Array) -> jax.Array:
    """[m, in] x [in, out] on a CPU.

    A lone bfloat16 row is padded to two, which run ten times faster.
    """
    if _lonely(x):
        return (jnp.concatenate([x, x]) @ weight)[:1]
    return _product(x, weight)


def _lonely(rows: jax.Array) -> bool:
    return rows.shape[0] == 1 and rows.dtype == jnp.bfloat16


@jax.custom_vjp
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A product whose weight gradient is taken from a transposed copy of its narrower operand."""
    return x @ weight


def _product_forward(x, weight):
    return x @ weight, (x, weight)


def _product_backward(residuals, gradient):
    x, weight = residuals
    d_x = jax.lax.dot_general(gradient, weight, (((1,), (1,)), ((), ())))
    if x.shape[1] <= gradient.shape[1]:
        return d_x, transposed(x) @ gradient
    return d_x, transposed(jax.lax.optimization_barrier(transposed(gradient) @ x))


_product.defvjp(_product_forward, _product_backward)
