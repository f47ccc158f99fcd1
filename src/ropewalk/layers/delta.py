"""Gated DeltaNet: a mixer whose memory of a sequence has a fixed size. arXiv:2412.06464"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.layers.attention import Context
from ropewalk.layers.cache import Recurrent
from ropewalk.layers.linear import INIT_STD, Linear
from ropewalk.layers.norm import RMSNorm
from ropewalk.ops import convolution, delta_rule
from ropewalk.parallel.axes import shard

# At the start a head forgets rate * step of what it knows with every token: rates are uniform up to
# 16, steps log-uniform from 0.001 to 0.1. arXiv:2405.21060
_LOG_STEPS = math.log(1e-3), math.log(1e-1)
# Added to the squared length of a query or key.
_LENGTH_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Spec:
    """The shape of a gated delta layer."""

    hidden: int
    key_heads: int
    """of queries and keys; value heads share them in groups"""
    value_heads: int
    key_dim: int
    value_dim: int
    width: int
    """how many tokens the short convolution sees, the last one among them"""
    norm_eps: float
    out_std: float = INIT_STD


class GatedDelta(nnx.Module):
    """Short convolutions over queries, keys and values, the gated delta rule, and a gated norm,
    between projections. Sees nothing of another document, nor of padding."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        d, k, n = spec.hidden, spec.key_heads, spec.value_heads
        keys, values = (k, spec.key_dim), (n, spec.value_dim)
        key_axes, value_axes = ("kv_heads", "head_dim"), ("heads", "head_dim")
        self.spec = spec
        self.query = Filtered(d, keys, key_axes, spec.width, rngs=rngs)
        self.key = Filtered(d, keys, key_axes, spec.width, rngs=rngs)
        self.value = Filtered(d, values, value_axes, spec.width, rngs=rngs)
        self.beta = Linear((d,), (k, n // k), ("embed", *key_axes), rngs=rngs)
        self.decay = Linear((d,), (k, n // k), ("embed", *key_axes), rngs=rngs)
        rates = jax.random.uniform(rngs.params(), (n,), jnp.float32, 0.01, 16.0)
        self.a_log = nnx.Param(jnp.log(rates), axes=("heads",))
        steps = jnp.exp(jax.random.uniform(rngs.params(), (n,), jnp.float32, *_LOG_STEPS))
        self.dt_bias = nnx.Param(jnp.log(jnp.expm1(steps)), axes=("heads",))
        self.norm = RMSNorm(spec.value_dim, eps=spec.norm_eps, axes=("head_dim",))
        self.norm_gate = Linear((d,), values, ("embed", *value_axes), rngs=rngs)
        self.readout = Linear(values, (d,), (*value_axes, "embed"), std=spec.out_std, rngs=rngs)

    def __call__(
        self, x: jax.Array, ctx: Context, cache: Recurrent | None = None
    ) -> tuple[jax.Array, Recurrent | None]:
        """x [b, t, d] -> ([b, t, d], the cache after these tokens, or None).

        The first document of a call with a cache goes on from it; where the cache has several rows
        and x has one, segment i goes on from row i - 1.
        """
        stored, documents = ctx.segment_ids > 0, document_numbers(ctx.segment_ids)
        before = self.init_cache(x.shape[0], x.shape[1], x.dtype) if cache is None else cache
        rows = before.state.shape[0]
        if rows > x.shape[0]:
            stored = ctx.segment_ids == 1 + jnp.arange(rows)[:, None]
            documents = jnp.zeros_like(stored, jnp.int32)
        (q, k, v), inputs = self._filtered(x, documents, stored, before.inputs)
        q, k = _unit(q, self.spec.key_dim**-0.5), _unit(k)
        rule = delta_rule.recurrent if x.shape[1] == 1 else delta_rule.chunked
        g, beta = (jnp.broadcast_to(rate, (rows, *rate.shape[1:])) for rate in self._rates(x))
        y, state = rule(q, k, v, g, beta, documents, stored, before.state)
        if rows > x.shape[0]:
            own = jnp.maximum(ctx.segment_ids - 1, 0)[:, :, None, None]
            y = jnp.take_along_axis(y, own, axis=0)
        y = self.norm(y) * jax.nn.silu(self.norm_gate(x).astype(jnp.float32))
        y = self.readout(shard(y.astype(x.dtype), "batch", "time", "heads", None))
        return y, None if cache is None else Recurrent(state, inputs)

    span = 0  # what a query looks at beside the state

    def init_cache(self, batch: int, length: int, dtype: Any) -> Recurrent:
        """An empty state for each of `batch` sequences; the same size for any `length`."""
        spec = self.spec
        state = jnp.zeros((batch, spec.value_heads, spec.key_dim, spec.value_dim), jnp.float32)
        inputs = jnp.zeros((batch, spec.width - 1, sum(self._features())), dtype)
        return Recurrent(state, inputs)

    def mixing_flops(self, length: int) -> float:
        """Operations of the convolutions and the chunked delta rule, mean of a token in sequences
        of `length`; of the products within a chunk, half."""
        spec = self.spec
        state = 6 * spec.key_dim * spec.value_dim
        within = 2 * min(delta_rule.CHUNK, length) * (spec.key_dim + spec.value_dim)
        return 2 * spec.width * sum(self._features()) + spec.value_heads * (state + within)

    def _features(self) -> tuple[int, int, int]:
        """Of all queries, keys and values of a token."""
        keys = self.spec.key_heads * self.spec.key_dim
        return keys, keys, self.spec.value_heads * self.spec.value_dim

    def _filtered(self, x, documents, stored, carried):
        """Queries and keys [b, t, k, h_k], values [b, t, n, h_v], and their inputs that the next
        call is to carry, [b, w - 1, features]."""
        places, last = convolution.earlier(documents, stored, self.spec.width)
        first, second, _ = self._features()
        parts = jnp.split(carried, [first, first + second], axis=-1)
        each = zip((self.query, self.key, self.value), parts, strict=True)
        found, inputs = zip(*(one(x, part, places, last) for one, part in each), strict=True)
        return found, jnp.concatenate(inputs, axis=-1)

    def _rates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How much of each token is forgotten (its logarithm) and written, float32 [b, t, n]."""
        shape = *x.shape[:2], self.spec.value_heads
        decay, beta = (
            each(x).astype(jnp.float32).reshape(shape) for each in (self.decay, self.beta)
        )
        a, bias = (each[...].astype(jnp.float32) for each in (self.a_log, self.dt_bias))
        return -jnp.exp(a) * jax.nn.softplus(decay + bias), jax.nn.sigmoid(beta)


class Filtered(nnx.Module):
    """A projection to heads, a causal convolution of every feature by itself, SiLU."""

    def __init__(
        self,
        size: int,
        shape: tuple[int, int],
        axes: tuple[str, str],
        width: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.axis = axes[0]
        self.project = Linear((size,), shape, ("embed", *axes), rngs=rngs)
        most = width**-0.5
        value = jax.random.uniform(rngs.params(), (*shape, width), jnp.float32, -most, most)
        self.filter = nnx.Param(value, axes=(*axes, "kernel"))

    def __call__(
        self, x: jax.Array, carried: jax.Array, places: jax.Array, last: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x [b, t, d] (or [1, t, d], for all rows), carried [b, w - 1, n h], `places` and `last` of
        `convolution.earlier` -> ([b, t, n, h], what the next call is to carry)."""
        x = shard(self.project(x), "batch", "time", self.axis, None)
        x = jnp.broadcast_to(x, (carried.shape[0], *x.shape[1:]))
        before = carried.reshape(*carried.shape[:2], *x.shape[2:]).astype(x.dtype)
        y = jax.nn.silu(convolution.causal(x, self.filter[...], before, places))
        after = convolution.taken(jnp.concatenate([before, x], axis=1), last)
        return y, after.reshape(carried.shape).astype(carried.dtype)


def document_numbers(segment_ids: jax.Array) -> jax.Array:
    """int32 [b, t], counted from 0, one more where a token's segment is another than that of the
    last token that is no padding; segment_ids int32 [b, t], 0 = padding."""
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    last = jax.lax.cummax(jnp.where(segment_ids > 0, place, 0), axis=1)
    current = jnp.take_along_axis(segment_ids, last, axis=1)
    before = jnp.pad(current[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum((before > 0) & (current != before), axis=1, dtype=jnp.int32)


def _unit(x: jax.Array, length: float = 1.0) -> jax.Array:
    """x [..., h] scaled to a length, computed in float32."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + _LENGTH_EPS)
    return (wide * (length * inverse)).astype(x.dtype)
