"""Multi-head latent attention: keys and values of all heads are made from one small latent, and
only the latent is cached. arXiv:2405.04434 section 2.1"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx

from ropewalk.layers.attention import Context, visible_keys
from ropewalk.layers.cache import Dense, Paged
from ropewalk.layers.config import Count, HeadDim, Rotary
from ropewalk.layers.linear import INIT_STD, Linear, depth_std
from ropewalk.layers.norm import RMSNorm
from ropewalk.layers.rope import Yarn
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

    @property
    def width(self) -> int:
        """Of a head's query and key."""
        return self.nope_dim + self.rope_dim


class CompressedQuery(nnx.Module):
    """Queries made from a latent of their own."""

    def __init__(self, spec: Spec, latent: int, *, rngs: nnx.Rngs):
        width, axes = (spec.heads, spec.width), ("latent", "heads", "head_dim")
        self.down = Linear(
            (spec.hidden,), (latent,), ("embed", "latent"), bias=spec.bias, rngs=rngs
        )
        self.norm = RMSNorm(latent, eps=spec.norm_eps, axes=("latent",))
        self.up = Linear((latent,), width, axes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, d] -> [b, t, n, h]"""
        return self.up(self.norm(self.down(x)))


class LatentAttention(nnx.Module):
    """Attention whose cache holds one latent and one turned key a token, [r + rope_dim] features.

    Two ways that agree: *plain* makes every head's keys and values from the latents; *absorbed*
    takes queries into the latent's space, and lets all heads look at the latents themselves.
    """

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs):
        d, n, r = spec.hidden, spec.heads, spec.latent
        self.spec = spec
        self.attend: attention.Attend = attention.reference
        self.query = (
            Linear((d,), (n, spec.width), ("embed", "heads", "head_dim"), rngs=rngs)
            if spec.query_latent is None
            else CompressedQuery(spec, spec.query_latent, rngs=rngs)
        )
        self.down = Linear(
            (d,), (r + spec.rope_dim,), ("embed", "latent"), bias=spec.bias, rngs=rngs
        )
        self.norm = RMSNorm(r, eps=spec.norm_eps, axes=("latent",))
        axes = ("latent", "heads", "head_dim")
        self.key_up = Linear((r,), (n, spec.nope_dim), axes, rngs=rngs)
        self.value_up = Linear((r,), (n, spec.value_dim), axes, rngs=rngs)
        for each in (self.key_up, self.value_up):
            each.flip(len(axes))  # [n, h, r]: the absorbed way takes head by head, where it lies
        axes = ("heads", "head_dim", "embed")
        self.out = Linear(
            (n, spec.value_dim), (d,), axes, bias=spec.bias, std=spec.out_std, rngs=rngs
        )

    def __call__(self, x: jax.Array, ctx: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        """x [b, t, d] -> ([b, t, d], cache with the new latents in it, or None)."""
        spec, turn = self.spec, ctx.rotations["default"]
        q = self.query(x)
        q, q_turned = q[..., : spec.nope_dim], turn(q[..., spec.nope_dim :])
        down = self.down(x)[:, :, None]
        latent, k_turned = self.norm(down[..., : spec.latent]), turn(down[..., spec.latent :])
        latents = jnp.concatenate([latent, k_turned], axis=-1)  # [b, s, 1, r + rope_dim]
        here, scale = (ctx.positions, ctx.segment_ids), spec.scale
        if cache is None:
            q, read = self._plain(q, q_turned)
            seen = mask.visible(here[0], here[0], here[1], here[1])
            y = self.attend(q, *read(latents), seen, scale)
        else:
            absorbs = self._absorbs(x.shape[1], cache.length)
            q, read = (self._absorbed if absorbs else self._plain)(q, q_turned)
            new, near = (latents,), (None, None)
            y, cache = cache.attend(q, new, *here, near, self.attend, read, scale=scale)
            if absorbs:
                value = self.value_up.weight[...].astype(q.dtype)
                y = jnp.einsum("btnr,nhr->btnh", y[..., : spec.latent], value)
        return self.out(shard(y, "batch", "time", "heads", None)), cache

    def init_cache(self, batch: int, length: int, dtype: Any) -> Dense:
        """An empty cache for `length` tokens of each of `batch` sequences."""
        return Dense.empty(batch, length, [(1, self.spec.latent + self.spec.rope_dim)], dtype)

    span = None  # a query looks at everything before it

    def init_pages(self, count: int, size: int, dtype: Any) -> Paged:
        """`count` empty pages of `size` tokens each."""
        return Paged.empty(count, size, [(1, self.spec.latent + self.spec.rope_dim)], dtype)

    def mixing_flops(self, length: int) -> float:
        """Operations of scores and weighted values, mean of a token in causal sequences of
        `length`."""
        spec = self.spec
        return 2 * spec.heads * (spec.width + spec.value_dim) * visible_keys(length)

    def _absorbs(self, t: int, s: int) -> bool:
        """Whether `_absorbed` needs fewer operations for t queries and s latents, a head."""
        spec = self.spec
        inner = spec.nope_dim + spec.value_dim
        plain = t * s * (inner + spec.rope_dim) + s * spec.latent * inner
        return t * s * (2 * spec.latent + spec.rope_dim) + t * spec.latent * inner < plain

    def _plain(self, q, q_turned):
        """Queries, and how keys and values of all heads are made from latents."""

        def read(latents):
            latent, k_turned = latents[..., 0, : self.spec.latent], latents[..., self.spec.latent :]
            k = self.key_up(latent)
            k_turned = jnp.broadcast_to(k_turned, (*k.shape[:3], k_turned.shape[-1]))
            k = jnp.concatenate([k, k_turned], axis=-1)
            v = self.value_up(latent)
            return tuple(shard(each, "batch", "time", "heads", None) for each in (k, v))

        q = jnp.concatenate([q, q_turned], axis=-1)
        return shard(q, "batch", "time", "heads", None), read

    def _absorbed(self, q, q_turned):
        """Queries in the space of the latents, and the latents as keys and values."""
        key = self.key_up.weight[...].astype(q.dtype)
        q = jnp.concatenate([jnp.einsum("btnh,nhr->btnr", q, key), q_turned], axis=-1)
        # The turned key stands in for values too, so that the cache is read where it lies.
        return q, lambda latents: (latents, latents)


class LatentConfig(Rotary):
    """A config of latent attention, and of fine experts beside shared ones in all layers but the
    first `first_k_dense_replace`."""

    harmless: ClassVar[frozenset[str]] = frozenset({
        "aux_loss_alpha", "ep_size", "head_dim", "num_key_value_heads", "num_nextn_predict_layers",
        "output_router_logits", "qk_head_dim", "router_aux_loss_coef", "router_bias_update_speed",
        "seq_aux",
    })  # fmt: skip

    kv_lora_rank: Count = 512
    q_lora_rank: Count | None = None
    qk_nope_head_dim: Count = 128
    qk_rope_head_dim: HeadDim = 64
    v_head_dim: Count = 128
    rope_interleave: bool = True
    """whether the features that are turned together are neighbours"""
    attention_bias: bool = False
    first_k_dense_replace: int = pydantic.Field(default=0, ge=0)
    moe_intermediate_size: Count
    n_routed_experts: Count
    n_shared_experts: Count
    num_experts_per_tok: Count
    n_group: Count | None = None
    topk_group: Count | None = None
    routed_scaling_factor: float = 1.0

    def to_hf(self) -> dict[str, Any]:
        """As `Rotary.to_hf`, with the heads of keys, for which `transformers` assumes 128."""
        return {**super().to_hf(), "num_key_value_heads": self.num_attention_heads}

    def unused(self) -> tuple[str, ...]:
        """Layers beyond the last, which predict a token more."""
        return (f"model.layers.{self.num_hidden_layers}.*",)

    def rotary_dim(self) -> int:
        """A part of the head."""
        return self.qk_rope_head_dim

    def interleaved(self) -> bool:
        """As the config says."""
        return self.rope_interleave

    def scale(self) -> float:
        """Of the scores: YaRN's temperature is here, as far as it is not in the rotation."""
        scale, scaling = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5, self.rope_scaling
        if isinstance(scaling, Yarn) and scaling.mscale_all_dim:
            scale *= scaling.temperature(scaling.mscale_all_dim) ** 2
        return scale

    def kinds(self) -> tuple[str, ...]:
        """Of every layer."""
        dense = min(self.first_k_dense_replace, self.num_hidden_layers)
        return ("dense",) * dense + ("moe",) * (self.num_hidden_layers - dense)


def attention_of(c: LatentConfig, rngs: nnx.Rngs) -> LatentAttention:
    """Latent attention in the sizes of a config."""
    spec = Spec(
        c.hidden_size,
        c.num_attention_heads,
        c.kv_lora_rank,
        c.q_lora_rank,
        nope_dim=c.qk_nope_head_dim,
        rope_dim=c.qk_rope_head_dim,
        value_dim=c.v_head_dim,
        scale=c.scale(),
        bias=c.attention_bias,
        out_std=depth_std(c.num_hidden_layers),
    )
    return LatentAttention(spec, rngs=rngs)
