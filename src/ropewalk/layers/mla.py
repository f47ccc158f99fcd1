"""Multi-head latent attention: keys and values of all heads are made from one small latent, and
only the latent is cached. arXiv:2405.04434 section 2.1"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.layers.attention import Context, visible_keys
from ropewalk.layers.cache import Dense
from ropewalk.layers.linear import INIT_STD, Linear
from ropewalk.layers.norm import RMSNorm
from ropewalk.ops import attention, mask
from ropewalk.parallel.axes import shard


@dataclasses.dataclass(frozen=True)
class Spec:
    """The shape of a latent attention layer, in features."""

    hidden: int
    heads: int
    latent: int
    """what keys and values are made from"""
    query_latent: int | None
    """what queries are made from; None: the input itself"""
    nope_dim: int
    """of a head's query and key, not turned"""
    rope_dim: int
    """of a head's query, and of the one key that all heads share, turned"""
    value_dim: int
    scale: float
    bias: bool = False
    norm_eps: float = 1e-6
    out_std: float = INIT_STD


class LatentAttention(nnx.Module):
    """Attention whose cache holds one latent and one turned key a token, [r + rope_dim] features.

    Two ways that agree: *plain* makes every head's keys and values from the latents; *absorbed*
    takes queries into the latent's space, and lets all heads look at the latents themselves.
    """

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        d, n, r = spec.hidden, spec.heads, spec.latent
        self.spec = spec
        self.attend: attention.Attend = attention.reference
        size, axis, down = d, "embed", spec.query_latent
        self.query_down = (
            None
            if down is None
            else Linear((d,), (down,), ("embed", "latent"), bias=spec.bias, rngs=rngs)
        )
        self.query_norm = (
            None if down is None else RMSNorm(down, eps=spec.norm_eps, axes=("latent",))
        )
        if down is not None:
            size, axis = down, "latent"
        width = spec.nope_dim + spec.rope_dim
        self.query = Linear((size,), (n, width), (axis, "heads", "head_dim"), rngs=rngs)
        self.down = Linear(
            (d,), (r + spec.rope_dim,), ("embed", "latent"), bias=spec.bias, rngs=rngs
        )
        self.norm = RMSNorm(r, eps=spec.norm_eps, axes=("latent",))
        axes = ("latent", "heads", "head_dim")
        self.key = Linear((r,), (n, spec.nope_dim), axes, rngs=rngs)
        self.value = Linear((r,), (n, spec.value_dim), axes, rngs=rngs)
        for each in (self.key, self.value):
            each.flip(len(axes))  # [n, h, r]: the absorbed way takes head by head, where it lies
        axes = ("heads", "head_dim", "embed")
        self.out = Linear(
            (n, spec.value_dim), (d,), axes, bias=spec.bias, std=spec.out_std, rngs=rngs
        )

    def __call__(self, x: jax.Array, ctx: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        """x [b, t, d] -> ([b, t, d], cache with the new latents in it, or None)."""
        spec, turn = self.spec, ctx.rotations["default"]
        if self.query_down is not None and self.query_norm is not None:
            q = self.query(self.query_norm(self.query_down(x)))
        else:
            q = self.query(x)
        q, q_turned = q[..., : spec.nope_dim], turn(q[..., spec.nope_dim :])
        down = self.down(x)[:, :, None]
        latent, k_turned = self.norm(down[..., : spec.latent]), turn(down[..., spec.latent :])
        latents = jnp.concatenate([latent, k_turned], axis=-1)  # [b, s, 1, r + rope_dim]
        if cache is None:
            segments = ctx.segment_ids, ctx.segment_ids
            seen = mask.visible(ctx.positions, ctx.positions, *segments)
        else:
            cache, (latents,), there = cache.extend((latents,), ctx.positions, ctx.segment_ids > 0)
            seen = mask.visible(ctx.positions, there)
        absorbed = cache is not None and self._absorbs(*seen.shape[1:])
        y = (self._absorbed if absorbed else self._plain)(q, q_turned, latents, seen)
        return self.out(shard(y, "batch", "time", "heads", None)), cache

    def init_cache(self, batch: int, length: int, dtype: Any) -> Dense:
        """An empty cache for `length` tokens of each of `batch` sequences."""
        return Dense.empty(batch, length, [(1, self.spec.latent + self.spec.rope_dim)], dtype)

    def mixing_flops(self, length: int) -> float:
        """Operations of scores and weighted values, mean of a token in causal sequences of
        `length`."""
        spec = self.spec
        width = spec.nope_dim + spec.rope_dim + spec.value_dim
        return 2 * spec.heads * width * visible_keys(length)

    def _absorbs(self, t: int, s: int) -> bool:
        """Whether `_absorbed` needs fewer operations for t queries and s latents, a head."""
        spec = self.spec
        inner = spec.nope_dim + spec.value_dim
        plain = t * s * (inner + spec.rope_dim) + s * spec.latent * inner
        return t * s * (2 * spec.latent + spec.rope_dim) + t * spec.latent * inner < plain

    def _plain(self, q, q_turned, latents, seen):
        latent, k_turned = latents[..., 0, : self.spec.latent], latents[..., self.spec.latent :]
        k = self.key(latent)
        k_turned = jnp.broadcast_to(k_turned, (*k.shape[:3], k_turned.shape[-1]))
        k = jnp.concatenate([k, k_turned], axis=-1)
        q = shard(jnp.concatenate([q, q_turned], axis=-1), "batch", "time", "heads", None)
        k = shard(k, "batch", "time", "heads", None)
        v = shard(self.value(latent), "batch", "time", "heads", None)
        return self.attend(q, k, v, seen, self.spec.scale)

    def _absorbed(self, q, q_turned, latents, seen):
        key, value = (one.weight[...].astype(q.dtype) for one in (self.key, self.value))
        q = jnp.concatenate([jnp.einsum("btnh,nhr->btnr", q, key), q_turned], axis=-1)
        # The turned key stands in for values too, so that the cache is read where it lies.
        y = self.attend(q, latents, latents, seen, self.spec.scale)[..., : self.spec.latent]
        return jnp.einsum("btnr,nhr->btnh", y, value)
