"""Multi-head attention with grouped keys and values, rotary positions and an optional norm on
queries and keys."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from ropewalk.layers.linear import INIT_STD, Linear
from ropewalk.layers.norm import RMSNorm
from ropewalk.ops import attention, mask, rope
from ropewalk.parallel.axes import shard


@dataclasses.dataclass(frozen=True)
class Spec:
    """The shape of an attention layer."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    out_bias: bool = False
    norm_eps: float | None = None
    """with a number: RMS norm over every query and key head"""
    out_std: float = INIT_STD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares."""

    positions: jax.Array
    """int32 [b, t], absolute"""
    segment_ids: jax.Array
    """int32 [b, t], 0 = padding"""
    cos: jax.Array
    sin: jax.Array


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(h)) v over the visible keys, between projections."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        d, n, k, h = spec.hidden, spec.heads, spec.kv_heads, spec.head_dim
        self.scale = h**-0.5
        self.attend: attention.Attend = attention.reference
        self.query = Linear((d,), (n, h), ("embed", "heads", "head_dim"), bias=spec.bias, rngs=rngs)
        self.key = Linear(
            (d,), (k, h), ("embed", "kv_heads", "head_dim"), bias=spec.bias, rngs=rngs
        )
        self.value = Linear(
            (d,), (k, h), ("embed", "kv_heads", "head_dim"), bias=spec.bias, rngs=rngs
        )
        out_axes = ("heads", "head_dim", "embed")
        self.out = Linear((n, h), (d,), out_axes, bias=spec.out_bias, std=spec.out_std, rngs=rngs)
        norm = spec.norm_eps
        self.query_norm = None if norm is None else RMSNorm(h, eps=norm, axis="head_dim")
        self.key_norm = None if norm is None else RMSNorm(h, eps=norm, axis="head_dim")

    def __call__(self, x: jax.Array, ctx: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        """x [b, t, d] -> ([b, t, d], cache with the new keys in it, or None)."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q = shard(rope.rotate(q, ctx.cos, ctx.sin), "batch", "time", "heads", None)
        k = shard(rope.rotate(k, ctx.cos, ctx.sin), "batch", "time", "kv_heads", None)
        v = shard(v, "batch", "time", "kv_heads", None)
        if cache is None:
            seen = mask.visible(ctx.positions, ctx.positions, ctx.segment_ids, ctx.segment_ids)
        else:
            cache = cache.write(k, v, ctx.positions, stored=ctx.segment_ids > 0)
            k, v, k_positions = cache.read()
            seen = mask.visible(ctx.positions, k_positions)
        y = shard(self.attend(q, k, v, seen, self.scale), "batch", "time", "heads", None)
        return self.out(y), cache
