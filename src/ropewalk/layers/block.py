"""The residual block of a decoder: attention, then a gated MLP, each between norms."""

import functools
from typing import Any

import jax
from flax import nnx

from ropewalk.layers.attention import Attention, Context, Spec
from ropewalk.layers.config import LMConfig
from ropewalk.layers.linear import depth_std
from ropewalk.layers.mlp import GatedMLP
from ropewalk.layers.norm import RMSNorm


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), in the sizes of a config.

    With `post`, each part's output is normed too before it is added. `attention`
    are the entries of its Spec that the config's sizes do not give.
    """

    def __init__(
        self,
        c: LMConfig,
        *,
        post: bool = False,
        mlp_bias: bool = False,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        std = depth_std(c.num_hidden_layers)
        norm = functools.partial(
            RMSNorm, c.hidden_size, eps=c.rms_norm_eps, around_one=c.around_one
        )
        heads = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        spec = Spec(c.hidden_size, *heads, out_std=std, norm_around_one=c.around_one, **attention)
        self.attention_norm = norm()
        self.attention = Attention(spec, rngs=rngs)
        self.attention_post_norm = norm() if post else None
        self.mlp_norm = norm()
        self.mlp = GatedMLP(
            c.hidden_size,
            c.intermediate_size,
            activation=c.hidden_act,
            bias=mlp_bias,
            out_std=std,
            rngs=rngs,
        )
        self.mlp_post_norm = norm() if post else None

    def __call__(
        self, x: jax.Array, ctx: Context, cache: Any = None
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """x [b, t, d] -> ([b, t, d], cache, nothing to report)."""
        y, cache = self.attention(self.attention_norm(x), ctx, cache)
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y)), cache, {}
