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
    norm_around_one: bool = False
    scale: float | None = None
    """of the scores; by default 1 / sqrt(head_dim)"""
    soft_cap: float | None = None
    """bound of the scores"""
    window: int | None = None
    """how many of the last keys a query sees, its own among them; by default all"""
    rope: str = "default"
    """which of the model's rotations turns queries and keys"""
    out_std: float = INIT_STD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares."""

    positions: jax.Array
    """int32 [b, t], absolute"""
    segment_ids: jax.Array
    """int32 [b, t], 0 = padding"""
    rotations: dict[str, tuple[jax.Array, jax.Array]]
    """by name, cosines and sines of every position, each [b, t, h/2]"""


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(h)) v over the visible keys, between projections."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        d, n, k, h = spec.hidden, spec.heads, spec.kv_heads, spec.head_dim
        self.spec = spec
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
        eps, around_one = spec.norm_eps, spec.norm_around_one
        norms = [
            None if eps is None else RMSNorm(h, eps=eps, axis="head_dim", around_one=around_one)
            for _ in "qk"
        ]
        self.query_norm, self.key_norm = norms

    def __call__(self, x: jax.Array, ctx: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        """x [b, t, d] -> ([b, t, d], cache with the new keys in it, or None)."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        turn = ctx.rotations[self.spec.rope]
        q = shard(rope.rotate(q, *turn), "batch", "time", "heads", None)
        k = shard(rope.rotate(k, *turn), "batch", "time", "kv_heads", None)
        v = shard(v, "batch", "time", "kv_heads", None)
        if cache is None:
            segments = ctx.segment_ids, ctx.segment_ids
            seen = mask.visible(ctx.positions, ctx.positions, *segments, window=self.spec.window)
        else:
            cache = cache.write(k, v, ctx.positions, stored=ctx.segment_ids > 0)
            k, v, k_positions = cache.read()
            seen = mask.visible(ctx.positions, k_positions, window=self.spec.window)
        scale = self.spec.scale or self.spec.head_dim**-0.5
        y = self.attend(q, k, v, seen, scale, self.spec.soft_cap)
        y = shard(y, "batch", "time", "heads", None)
        return self.out(y), cache
