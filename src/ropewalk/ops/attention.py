"""Scaled dot-product attention behind one signature: a reference, one for CPUs, the library's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ropewalk.core.errors import LayoutError
from ropewalk.ops.kernels import cpu
from ropewalk.ops.matmul import transposed

Attend = Callable[..., jax.Array]

# Large enough to vanish in a softmax, small enough that a row of nothing else stays finite.
_MASKED = -1e30


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """softmax(cap(q k^T * scale)) v, the softmax in float32; queries share keys in groups of n / k.

    q [b,t,n,h], k [b,s,k,h], v [b,s,k,g], seen bool [b,t,s] -> [b,t,n,g]. `soft_cap` c bounds the
    scores: cap(s) = c tanh(s / c), arXiv:2408.00118 section 2. `sinks` [n] are scores of a key with
    no value that every query sees, arXiv:2309.17453. A query that sees nothing gets a finite value.
    """
    sinks = _sinks_by_head(sinks, k.shape[2], q.shape[1])
    q, k, v = _by_head(q, k.shape[2]), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    return _by_token(_one(q, k, v, seen[:, None], scale, soft_cap, sinks)[0], seen.shape[1])


def library(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`jax.nn.dot_product_attention`, which takes cuDNN's kernel where it can; as `reference`,
    which takes over where scores are capped, have sinks, or values another size than keys."""
    if soft_cap is not None or sinks is not None or k.shape != v.shape:
        return reference(q, k, v, seen, scale, soft_cap, sinks)
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=scale)


def sequential(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """One sequence after the other, so that its scores stay in a CPU's cache; as `reference`.

    The backward pass makes the probabilities again from the log-normaliser, as arXiv:2205.14135
    does, and keeps nothing of size t x s. `reference` takes over where scores are capped or have
    sinks.
    """
    if q.shape[0] == 1 or q.shape[1] == 1 or soft_cap is not None or sinks is not None:
        return reference(q, k, v, seen, scale, soft_cap, sinks)
    q, k, v = _by_head(q, k.shape[2]), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    return _by_token(_sequential(scale, q, k, v, seen), seen.shape[1])


Block = tuple[jax.Array, jax.Array, jax.Array]


def streamed(
    q: jax.Array,
    block: Callable[[jax.Array], Block],
    count: jax.Array,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """As `reference`, over keys that come in `count` (at least 1) blocks and are read once, with a
    running maximum and normaliser. arXiv:1805.02867

    q [b,t,n,h], block(i) -> k [b,s,k,h], v [b,s,k,g], seen bool [b,t,s] -> [b,t,n,g].
    """
    k, v, seen = jax.eval_shape(block, jnp.int32(0))
    rows = _by_head(q, k.shape[2])
    sinks = _sinks_by_head(sinks, k.shape[2], q.shape[1])
    one = jnp.zeros((*rows.shape[:3], 1), jnp.float32)
    top = one + (_MASKED if sinks is None else sinks)
    total = one if sinks is None else one + 1
    y = jnp.zeros((*rows.shape[:3], v.shape[-1]), jnp.float32)

    def step(i, carry):
        top, total, y = carry
        k, v, seen = block(i)
        scores = _scores(rows, jnp.swapaxes(k, 1, 2), seen[:, None], scale, soft_cap)
        highest = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        kept, weights = jnp.exp(top - highest), jnp.exp(scores - highest)
        total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
        return highest, total, y * kept + _product(weights.astype(v.dtype), jnp.swapaxes(v, 1, 2))

    _, total, y = jax.lax.fori_loop(0, count, step, (top, total, y))
    return _by_token((y / total).astype(v.dtype), seen.shape[1])


def paged(
    q: jax.Array,
    pools: tuple[jax.Array, jax.Array],
    scales: tuple[jax.Array, ...],
    seen: tuple[jax.Array, jax.Array, jax.Array],
    queries: tuple[jax.Array, jax.Array],
    count: jax.Array,
    near: tuple[int | None, int | None],
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """As `streamed`, by a CPU's kernel over pages where they lie: see `kernels.cpu.attend`.

    q [b,t,n,h] -> [b,t,n,g]
    """
    heads, t = pools[0].shape[1], q.shape[1]
    rows, by_head = _by_head(q, heads), _sinks_by_head(sinks, heads, t)
    if by_head is None:
        by_head = jnp.full((heads, rows.shape[2]), _MASKED, jnp.float32)
    by_head = by_head.reshape(heads, -1)
    y = cpu.attend(rows, pools, scales, seen, queries, count, by_head, near, scale, soft_cap)
    return _by_token(y, t)


IMPLEMENTATIONS: dict[str, Attend] = {
    "reference": reference,
    "sequential": sequential,
    "library": library,
}


def choose(name: str, platform: str, devices: int) -> tuple[str, Attend]:
    """The implementation a layout asks for; `auto` takes what is fastest on these devices."""
    if name == "auto":
        alone = "sequential" if devices == 1 else "reference"
        name = {"cpu": alone, "gpu": "library"}.get(platform, "reference")
    if name not in IMPLEMENTATIONS:
        raise LayoutError(f"layout.attention = {name}: use auto, {', '.join(IMPLEMENTATIONS)}")
    return name, IMPLEMENTATIONS[name]


def _by_head(q: jax.Array, kv_heads: int) -> jax.Array:
    """[b, t, n, h] -> [b, k, (n / k) * t, h]: every query of a key's group as one more row."""
    b, t, n, h = q.shape
    return jnp.swapaxes(q, 1, 2).reshape(b, kv_heads, n // kv_heads * t, h)


def _sinks_by_head(sinks: jax.Array | None, kv_heads: int, t: int) -> jax.Array | None:
    """[n] -> float32 [k, (n / k) * t, 1], beside the rows of `_by_head`."""
    if sinks is None:
        return None
    groups = sinks.astype(jnp.float32).reshape(kv_heads, -1, 1)
    return jnp.broadcast_to(groups, (*groups.shape[:2], t)).reshape(kv_heads, -1, 1)


def _by_token(y: jax.Array, t: int) -> jax.Array:
    """The inverse of `_by_head`."""
    b, _, _, h = y.shape
    return jnp.swapaxes(y.reshape(b, -1, t, h), 1, 2)


def _scores(
    q: jax.Array, k: jax.Array, seen: jax.Array, scale: float, soft_cap: float | None = None
) -> jax.Array:
    """Masked float32 scores [..., g * t, s] of q [..., g * t, h]; seen [..., t, s]."""
    # Both contracted over their last dim: no transposed copy of the keys is made.
    scores = jnp.einsum("...qh,...kh->...qk", q, k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    t, s = seen.shape[-2:]
    grouped = scores.reshape(*scores.shape[:-2], -1, t, s)
    return jnp.where(seen[..., None, :, :], grouped, _MASKED).reshape(scores.shape)


def _one(q, k, v, seen, scale, soft_cap=None, sinks=None) -> tuple[jax.Array, jax.Array]:
    """Attention of grouped rows, and the logarithm of each row's normaliser."""
    scores = _scores(q, k, seen, scale, soft_cap)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(top if sinks is None else jnp.maximum(top, sinks))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - top)
    y = _product(weights.astype(v.dtype), v) / total
    return y.astype(v.dtype), top + jnp.log(total)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _sequential_forward(scale, q, k, v, seen):
    y, log_total = jax.lax.map(lambda one: _one(*one, scale=scale), (q, k, v, seen))
    return y, (q, k, v, seen, y, log_total)


def _sequential_backward(scale: float, residuals: Any, gradient: jax.Array):
    def one(parts):
        q, k, v, seen, y, log_total, d_y = parts
        weights = jnp.exp(_scores(q, k, seen, scale) - log_total)
        d_weights = _product(d_y, jnp.swapaxes(v, -1, -2))
        mean = jnp.sum(d_y.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - mean) * scale).astype(q.dtype)
        d_v = _product(transposed(weights.astype(v.dtype)), d_y).astype(v.dtype)
        d_k = _product(transposed(d_scores), q).astype(k.dtype)
        return _product(d_scores, k).astype(q.dtype), d_k, d_v

    return *jax.lax.map(one, (*residuals, gradient)), None


def _run(scale, q, k, v, seen):
    return _sequential_forward(scale, q, k, v, seen)[0]


_sequential = jax.custom_vjp(_run, nondiff_argnums=(0,))
_sequential.defvjp(_sequential_forward, _sequential_backward)
