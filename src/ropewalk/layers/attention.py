"""Multi-head attention with grouped keys and values; what a family adds to it is a value of its
Spec."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.layers.cache import Dense, Paged, Ring
from ropewalk.layers.linear import INIT_STD, Linear
from ropewalk.layers.norm import RMSNorm
from ropewalk.ops import attention, mask, rope
from ropewalk.ops.norm import rms_norm
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
    """with a number: RMS norm of queries and keys before they are turned"""
    norm_over: Literal["head", "all"] = "head"
    """what one such norm goes over: each head, or all heads together"""
    norm_around_one: bool = False
    turned_norm_eps: float | None = None
    """with a number: RMS norm without scale over every head after it is turned"""
    scale: float | None = None
    """of the scores; by default 1 / sqrt(head_dim)"""
    soft_cap: float | None = None
    """bound of the scores"""
    sinks: bool = False
    """whether every head has a learned score that takes part in the softmax and has no value"""
    window: int | None = None
    """how many of the last keys a query sees, its own among them; by default all"""
    chunk: int | None = None
    """a query sees only the keys of its own chunk of so many positions; by default all"""
    rope: str | None = "default"
    """which of the model's rotations turns queries and keys; None for no positions"""
    temperature: tuple[float, float] | None = None
    """with (length, slope): queries grow by 1 + slope ln(1 + floor((position + 1) / length))"""
    gate: bool = False
    """whether the output is multiplied by the sigmoid of a projection of the input"""
    out_std: float = INIT_STD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares."""

    positions: jax.Array
    """int32 [b, t], absolute"""
    segment_ids: jax.Array
    """int32 [b, t], 0 = padding"""
    rotations: dict[str, "Turn"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
    """One rotation at the positions of a forward pass."""

    cos: jax.Array
    """[b, t, h/2] float32"""
    sin: jax.Array
    interleaved: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, n, h] -> [b, t, n, h]"""
        return rope.rotate(x, self.cos, self.sin, self.interleaved)


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(h)) v over the visible keys, between projections."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        d, n, k, h = spec.hidden, spec.heads, spec.kv_heads, spec.head_dim
        self.spec = spec
        self.attend: attention.Attend = attention.reference
        axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.query = Linear((d,), (n, h), axes, bias=spec.bias, rngs=rngs)
        self.key = Linear((d,), (k, h), kv_axes, bias=spec.bias, rngs=rngs)
        self.value = Linear((d,), (k, h), kv_axes, bias=spec.bias, rngs=rngs)
        self.gate = Linear((d,), (n, h), axes, bias=spec.bias, rngs=rngs) if spec.gate else None
        out_axes = ("heads", "head_dim", "embed")
        self.out = Linear((n, h), (d,), out_axes, bias=spec.out_bias, std=spec.out_std, rngs=rngs)
        self.query_norm = _norm(spec, n, "heads")
        self.key_norm = _norm(spec, k, "kv_heads")
        self.sinks = nnx.Param(jnp.zeros(n, jnp.float32), axes=("heads",)) if spec.sinks else None

    def __call__(self, x: jax.Array, ctx: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        """x [b, t, d] -> ([b, t, d], cache with the new keys in it, or None)."""
        spec = self.spec
        q, k = self._placed(self.query(x), self.key(x), ctx)
        v = shard(self.value(x), "batch", "time", "kv_heads", None)
        near, here = (spec.window, spec.chunk), (ctx.positions, ctx.segment_ids)
        how = {
            "scale": spec.scale or spec.head_dim**-0.5,
            "soft_cap": spec.soft_cap,
            "sinks": None if self.sinks is None else self.sinks[...],
        }
        if cache is None:
            seen = mask.visible(here[0], here[0], here[1], here[1], *near)
            y = self.attend(q, k, v, seen, **how)
        else:
            y, cache = cache.attend(q, (k, v), *here, near, self.attend, **how)
        y = y if self.gate is None else y * jax.nn.sigmoid(self.gate(x))
        return self.out(shard(y, "batch", "time", "heads", None)), cache

    def init_cache(self, batch: int, length: int, dtype: Any) -> Dense:
        """An empty cache for `length` tokens of each of `batch` sequences; no larger than what a
        query sees."""
        spec = self.spec
        near = min(spec.window or length, spec.chunk or length)
        kind = Ring if near < length else Dense
        return kind.empty(batch, near, [(spec.kv_heads, spec.head_dim)] * 2, dtype)

    @property
    def span(self) -> int | None:
        """How many positions back, its own among them, a query looks at most; None: all."""
        return self.spec.window or self.spec.chunk

    def init_pages(self, count: int, size: int, dtype: Any) -> Paged:
        """`count` empty pages of `size` tokens each."""
        return Paged.empty(count, size, [(self.spec.kv_heads, self.spec.head_dim)] * 2, dtype)

    def mixing_flops(self, length: int) -> float:
        """Operations of scores and weighted values, mean of a token in causal sequences of
        `length`."""
        spec = self.spec
        return 4 * spec.heads * spec.head_dim * visible_keys(length, spec.window, spec.chunk)

    def _placed(self, q: jax.Array, k: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """Queries [b, t, n, h] and keys [b, t, k, h], normed and turned."""
        spec = self.spec
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if spec.rope is not None:
            turn = ctx.rotations[spec.rope]
            q, k = turn(q), turn(k)
        if spec.turned_norm_eps is not None:
            q, k = (rms_norm(x, None, spec.turned_norm_eps) for x in (q, k))
        if spec.temperature is not None:
            length, slope = spec.temperature
            steps = jnp.floor((ctx.positions.astype(jnp.float32) + 1) / length)
            growth = 1 + slope * jnp.log1p(steps)
            q = (q * growth[..., None, None]).astype(q.dtype)
        q = shard(q, "batch", "time", "heads", None)
        return q, shard(k, "batch", "time", "kv_heads", None)


def visible_keys(length: int, window: int | None = None, chunk: int | None = None) -> float:
    """How many keys a token sees, the mean over causal sequences of `length`; half of all, counted
    as the area below the diagonal."""
    if chunk is not None and chunk < length:
        whole, rest = divmod(length, chunk)
        return (whole * chunk**2 + rest**2) / (2 * length)
    near = min(window or length, length)
    return near - near**2 / (2 * length) if length else 0.0


def _norm(spec: Spec, heads: int, axis: str) -> RMSNorm | None:
    if spec.norm_eps is None:
        return None
    more = {"eps": spec.norm_eps, "around_one": spec.norm_around_one}
    if spec.norm_over == "all":
        return RMSNorm(heads, spec.head_dim, axes=(axis, "head_dim"), **more)
    return RMSNorm(spec.head_dim, axes=("head_dim",), **more)
