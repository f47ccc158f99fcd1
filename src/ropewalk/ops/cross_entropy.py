"""Next-token cross-entropy that never holds the logits of a whole batch.

The time dim is cut into tiles; a tile's logits are made, turned into its loss and its gradients,
and dropped. The gradients are computed in the forward pass, so the tokens x vocabulary numbers a
backward pass would read are neither stored nor made twice.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ropewalk.ops.matmul import transposed
from ropewalk.parallel.axes import platform

# Logits of one tile: small enough to stay near the cores, large enough for full-rate products.
_TILE_BYTES = 32 << 20


class CrossEntropy(NamedTuple):
    """Sums over all tokens, float32 scalars. Only `loss` carries a gradient."""

    loss: jax.Array
    """weighted cross-entropy in nats, plus the z-loss"""
    nats: jax.Array
    """weighted cross-entropy alone"""
    weight: jax.Array
    """sum of the weights"""
    correct: jax.Array
    """weighted count of tokens whose most likely prediction was right"""


def cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    tiles: int | None = None,
    by_row: bool = False,
    soft_cap: float | None = None,
) -> CrossEntropy:
    """Sums of -log p(target) + z_loss * log^2 Z, with logits = x @ head in float32, the
    head first cast to x's dtype. z-loss:
    arXiv:2204.02311 section 5.

    x [b,t,d], head [d,v] (or [v,d] `by_row`), targets int32 [b,t], weights float32 [b,t]. `tiles`
    divides t; by default a tile's logits take about 32 MiB. With `soft_cap` c the logits are
    c tanh(x @ head / c). Differentiable in x and head, through
    `loss`.
    """
    tiles = tiles or tile_count(x.shape[0], x.shape[1], head.shape[0 if by_row else 1])
    return CrossEntropy(*_sums(tiles, z_loss, by_row, soft_cap, x, head, targets, weights))


def tile_count(batch: int, length: int, vocab: int) -> int:
    """The smallest divisor of `length` that keeps a tile's float32 logits within about 32 MiB."""
    wanted = math.ceil(4 * batch * length * vocab / _TILE_BYTES)
    return next(n for n in range(1, length + 1) if length % n == 0 and (n >= wanted or n == length))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _sums(tiles, z_loss, by_row, soft_cap, x, head, targets, weights):
    to_logits = "bd,vd->bv" if by_row else "bd,dv->bv"
    head = head.astype(x.dtype)

    def body(sums, tile):
        x, targets, weights = tile
        logits = _capped(_product(x, head, to_logits), soft_cap)
        return sums + _tile_sums(
            logits, jax.nn.logsumexp(logits, axis=-1), targets, weights, z_loss
        ), None

    sums, _ = jax.lax.scan(body, jnp.zeros(4, jnp.float32), _tiled(tiles, x, targets, weights))
    return tuple(sums)


def _sums_forward(tiles, z_loss, by_row, soft_cap, x, head, targets, weights):
    """With e = exp(logits - max) and total = sum e, the gradient of the logits is, row by row,
    c * e but at the target, c = weight * (1 + 2 z_loss log Z) / total. The c is applied to the
    narrow side of both products, and the target's entry corrected in e: no second pass over it.
    """
    to_logits, to_x = ("bd,vd->bv", "bv,vd->bd") if by_row else ("bd,dv->bv", "bv,dv->bd")
    shape = head.shape[::-1] if by_row else head.shape
    like_head, head = jnp.zeros((0,), head.dtype), head.astype(x.dtype)

    def body(carry, tile):
        sums, d_head = carry
        x, targets, weights = tile
        logits = _capped(_product(x, head, to_logits), soft_cap)
        top = jnp.max(logits, axis=-1, keepdims=True)
        e = jnp.exp(logits - top)
        total = jnp.sum(e, axis=-1)
        log_z = top[..., 0] + jnp.log(total)
        sums = sums + _tile_sums(logits, log_z, targets, weights, z_loss)
        slope = 1 + 2 * z_loss * log_z
        c = (weights * slope / total)[..., None]
        d_logits = _minus_at(e.astype(x.dtype), targets, total / slope)
        if soft_cap is not None:
            d_logits = d_logits * (1 - (logits / soft_cap) ** 2).astype(x.dtype)
        d_x = c * _product(d_logits, head, to_x)
        scaled = (c * x.astype(jnp.float32)).astype(x.dtype)
        if platform() == "cpu":
            d_head = d_head + _product(transposed(scaled), d_logits, "db,bv->dv")
        else:
            d_head = d_head + _product(scaled, d_logits, "bd,bv->dv")
        return (sums, d_head), d_x.astype(x.dtype)

    start = (jnp.zeros(4, jnp.float32), jnp.zeros(shape, jnp.float32))
    (sums, d_head), d_x = jax.lax.scan(body, start, _tiled(tiles, x, targets, weights))
    if by_row:  # the barrier: XLA may not fold the transposition into the product above
        d_head = jax.lax.optimization_barrier(d_head).T
    return tuple(sums), (_untiled(d_x, x.shape), d_head, like_head)


def _sums_backward(tiles, z_loss, by_row, soft_cap, residuals, cotangents):
    d_x, d_head, like_head = residuals
    scale = cotangents[0]
    return (scale * d_x).astype(d_x.dtype), (scale * d_head).astype(like_head.dtype), None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _capped(logits, soft_cap):
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _minus_at(e, targets, amount):
    """e with `amount` taken from each row's entry at its target."""
    chosen = jnp.take_along_axis(e, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)
    rows = jnp.indices(targets.shape, sparse=True)
    return e.at[*rows, targets].set((chosen - amount).astype(e.dtype))


def _tile_sums(logits, log_z, targets, weights, z_loss):
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = log_z - chosen
    right = (jnp.max(logits, axis=-1) == chosen).astype(jnp.float32)
    parts = (nats + z_loss * log_z**2, nats, jnp.ones_like(weights), right)
    return jnp.stack([jnp.sum(jnp.where(weights > 0, weights * part, 0.0)) for part in parts])


def _tiled(tiles, x, targets, weights):
    """[b, t, ...] -> [tiles, b, t/tiles, ...], with batch and time flattened on a CPU, where
    products want two dims."""

    def cut(a):
        b, t, *rest = a.shape
        a = jnp.moveaxis(a.reshape(b, tiles, t // tiles, *rest), 1, 0)
        return a.reshape(tiles, b * (t // tiles), *rest) if platform() == "cpu" else a

    return jax.tree.map(cut, (x, targets, weights))


def _untiled(x, shape):
    b, t, d = shape
    return jnp.moveaxis(x.reshape(-1, b, t // x.shape[0], d), 0, 1).reshape(shape)


def _product(a, b, letters):
    """A product with float32 result; `b` in the letters stands for one dim of tokens or, off the
    CPU, for two."""
    if a.ndim == 3 or b.ndim == 3:
        letters = letters.replace("b", "bt")
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)
