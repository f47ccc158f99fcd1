"""The residual block of a decoder: something that mixes tokens, then something that works on each,
between norms."""

from typing import Any

import jax
from flax import nnx

from ropewalk.layers.attention import Attention, Context, Spec
from ropewalk.layers.config import LMConfig
from ropewalk.layers.linear import depth_std
from ropewalk.layers.mlp import GatedMLP


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    `attention(x, ctx, cache) -> (y, cache)` and `mlp(x, ctx) -> (y, what it reports)` are any parts
    of this kind. With `post`, each part's output is normed too before it is added; without `pre`,
    its input is not.
    """

    def __init__(
        self, c: LMConfig, attention: Any, mlp: Any, *, pre: bool = True, post: bool = False
    ):
        self.attention_norm = c.norm() if pre else None
        self.attention = attention
        self.attention_post_norm = c.norm() if post else None
        self.mlp_norm = c.norm() if pre else None
        self.mlp = mlp
        self.mlp_post_norm = c.norm() if post else None

    def __call__(
        self, x: jax.Array, ctx: Context, cache: Any = None
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """x [b, t, d] -> ([b, t, d], cache, what the mlp reports)."""
        y, cache = self.attention(_normed(self.attention_norm, x), ctx, cache)
        x = x + _normed(self.attention_post_norm, y)
        y, report = self.mlp(_normed(self.mlp_norm, x), ctx)
        return x + _normed(self.mlp_post_norm, y), cache, report


def attention(c: Any, rngs: nnx.Rngs, **more: Any) -> Attention:
    """Attention in the sizes of a config; `more` are the entries of its Spec that the sizes do not
    give."""
    heads = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    std = depth_std(c.num_hidden_layers)
    spec = Spec(c.hidden_size, *heads, out_std=std, norm_around_one=c.around_one, **more)
    return Attention(spec, rngs=rngs)


def mlp(c: LMConfig, rngs: nnx.Rngs, inner: int | None = None, bias: bool = False) -> GatedMLP:
    """A gated MLP in the sizes of a config."""
    return GatedMLP(
        c.hidden_size,
        inner or c.intermediate_size,
        activation=c.hidden_act,
        bias=bias,
        out_std=depth_std(c.num_hidden_layers),
        rngs=rngs,
    )


def _normed(norm: Any, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
