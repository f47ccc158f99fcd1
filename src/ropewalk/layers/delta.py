"""Gated DeltaNet: a mixer whose memory of a sequence has a fixed size. arXiv:2412.06464"""

import dataclasses
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
        d, k, n, width = spec.hidden, spec.key_heads, spec.value_heads, spec.width
        keys, values = (k, spec.key_dim), (n, spec.value_dim)
        key_axes, value_axes = ("kv_heads", "head_dim"), ("heads", "head_dim")
        self.spec = spec
        self.query = Linear((d,), keys, ("embed", *key_axes), rngs=rngs)
        self.key = Linear((d,), keys, ("embed", *key_axes), rngs=rngs)
        self.value = Linear((d,), values, ("embed", *value_axes), rngs=rngs)
        self.gate = Linear((d,), values, ("embed", *value_axes), rngs=rngs)
        self.query_filter = Filter(keys, key_axes, width, rngs=rngs)
        self.key_filter = Filter(keys, key_axes, width, rngs=rngs)
        self.value_filter = Filter(values, value_axes, width, rngs=rngs)
        self.beta = Linear((d,), (k, n // k), ("embed", *key_axes), rngs=rngs)
        self.decay = Linear((d,), (k, n // k), ("embed", *key_axes), rngs=rngs)
        rates = jax.random.uniform(rngs.params(), (n,), jnp.float32, 0.01, 16.0)
        self.a_log = nnx.Param(jnp.log(rates), axes=("heads",))
        self.dt_bias = nnx.Param(jnp.ones(n, jnp.float32), axes=("heads",))
        self.norm = RMSNorm(spec.value_dim, eps=spec.norm_eps, axes=("head_dim",))
        self.out = Linear(values, (d,), (*value_axes, "embed"), std=spec.out_std, rngs=rngs)

    def __call__(
        self, x: jax.Array, ctx: Context, cache: Recurrent | None = None
    ) -> tuple[jax.Array, Recurrent | None]:
        """x [b, t, d] -> ([b, t, d], the cache after these tokens, or None).

        The first document of a call with a cache goes on from it.
        """
        stored, documents = ctx.segment_ids > 0, document_numbers(ctx.segment_ids)
        before = self.init_cache(x.shape[0], x.shape[1], x.dtype) if cache is None else cache
        (q, k, v), inputs = self._filtered(x, documents, stored, before.inputs)
        q = _unit(q, self.spec.key_dim**-0.5)
        rule = delta_rule.recurrent if x.shape[1] == 1 else delta_rule.chunked
        y, state = rule(q, _unit(k), v, *self._rates(x), documents, stored, before.state)
        y = self.norm(y) * jax.nn.silu(self.gate(x).astype(jnp.float32))
        y = self.out(shard(y.astype(x.dtype), "batch", "time", "heads", None))
        return y, None if cache is None else Recurrent(state, inputs)

    def init_cache(self, batch: int, length: int, dtype: Any) -> Recurrent:
        """An empty state for each of `batch` sequences; the same size for any `length`."""
        spec = self.spec
        state = jnp.zeros((batch, spec.value_heads, spec.key_dim, spec.value_dim), jnp.float32)
        return Recurrent(state, jnp.zeros((batch, spec.width - 1, self._features()), dtype))

    def mixing_flops(self, length: int) -> float:
        """Operations of the convolutions and the chunked delta rule, mean of a token in sequences
        of `length`; of the products within a chunk, half."""
        spec = self.spec
        state = 6 * spec.key_dim * spec.value_dim
        within = 2 * min(delta_rule.CHUNK, length) * (spec.key_dim + spec.value_dim)
        return 2 * spec.width * self._features() + spec.value_heads * (state + within)

    def _features(self) -> int:
        spec = self.spec
        return 2 * spec.key_heads * spec.key_dim + spec.value_heads * spec.value_dim

    def _filtered(self, x, documents, stored, carried):
        """Queries, keys [b, t, k, h_k] and values [b, t, n, h_v] after their convolutions, and the
        last inputs of these, [b, w - 1, features]."""
        places, last = convolution.earlier(documents, stored, self.spec.width)
        parts = (
            (self.query(x), self.query_filter, "kv_heads"),
            (self.key(x), self.key_filter, "kv_heads"),
            (self.value(x), self.value_filter, "heads"),
        )
        found, inputs, start = [], [], 0
        for part, filter_, axis in parts:
            part = shard(part, "batch", "time", axis, None)
            lead, shape = carried.shape[:2], part.shape[2:]
            stop = start + shape[0] * shape[1]
            front = carried[..., start:stop].reshape(*lead, *shape)
            found.append(jax.nn.silu(filter_(part, front, places)))
            every = jnp.concatenate([front.astype(part.dtype), part], axis=1)
            inputs.append(convolution.taken(every, last).reshape(*lead, -1))
            start = stop
        return found, jnp.concatenate(inputs, axis=-1).astype(carried.dtype)

    def _rates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How much of each token is forgotten (its logarithm) and written, float32 [b, t, n]."""
        shape = *x.shape[:2], self.spec.value_heads
        decay, beta = (
            each(x).astype(jnp.float32).reshape(shape) for each in (self.decay, self.beta)
        )
        a, bias = (each[...].astype(jnp.float32) for each in (self.a_log, self.dt_bias))
        return -jnp.exp(a) * jax.nn.softplus(decay + bias), jax.nn.sigmoid(beta)


class Filter(nnx.Module):
    """A causal convolution of every feature by itself, over the last `width` tokens."""

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str, ...], width: int, *, rngs: nnx.Rngs
    ):
        most = width**-0.5
        value = jax.random.uniform(rngs.params(), (*shape, width), jnp.float32, -most, most)
        self.weight = nnx.Param(value, axes=(*axes, "kernel"))

    def __call__(self, x: jax.Array, carried: jax.Array, places: jax.Array) -> jax.Array:
        """As `ops.convolution.causal`."""
        return convolution.causal(x, self.weight[...], carried, places)


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
