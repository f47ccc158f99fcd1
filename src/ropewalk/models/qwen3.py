"""Qwen3 (dense): pre-norm blocks with SwiGLU, and an RMS norm on every query and key head in place
of biases. arXiv:2505.09388"""

from typing import Any, ClassVar

import jax
import pydantic
from flax import nnx

from ropewalk.core.weights import Rule
from ropewalk.layers.attention import Attention, Context, Spec
from ropewalk.layers.config import HeadDim, LMConfig
from ropewalk.layers.linear import depth_std
from ropewalk.layers.lm import LM
from ropewalk.layers.mlp import GatedMLP
from ropewalk.layers.names import decoder_rules
from ropewalk.layers.norm import RMSNorm


class Config(LMConfig):
    """Hugging Face's names; a head has 128 features whatever the hidden size."""

    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    head_dim: HeadDim = 128
    max_position_embeddings: pydantic.PositiveInt = 40960
    rope_theta: pydantic.PositiveFloat = 1e6
    attention_bias: bool = False


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); queries and keys are normed a head."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        std = depth_std(c.num_hidden_layers)
        spec = Spec(
            hidden=c.hidden_size,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            bias=c.attention_bias,
            out_bias=c.attention_bias,
            norm_eps=c.rms_norm_eps,
            out_std=std,
        )
        self.attention_norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.attention = Attention(spec, rngs=rngs)
        self.mlp_norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = GatedMLP(
            c.hidden_size, c.intermediate_size, activation=c.hidden_act, out_std=std, rngs=rngs
        )

    def __call__(
        self, x: jax.Array, ctx: Context, cache: Any = None
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """x [b, t, d] -> ([b, t, d], cache, nothing to report)."""
        y, cache = self.attention(self.attention_norm(x), ctx, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache, {}


class Model(LM):
    """A stack of one segment."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, [([lambda r: Block(c, rngs=r)], c.num_hidden_layers)], rngs=rngs)


def _sizes(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Config:
    return Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
    )


PRESETS: dict[str, Config] = {
    "qwen3-0.6b": _sizes(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _sizes(2048, 6144, 28, 16, True),
    "qwen3-4b": _sizes(2560, 9728, 36, 32, True),
    "qwen3-8b": _sizes(4096, 12288, 36, 32, False),
    "qwen3-14b": _sizes(5120, 17408, 40, 40, False),
    "qwen3-32b": _sizes(5120, 25600, 64, 64, False),
}

WEIGHTS = (
    *decoder_rules(),
    Rule("model.layers.{i}.self_attn.q_norm.weight", "layers.*.attention.query_norm.scale"),
    Rule("model.layers.{i}.self_attn.k_norm.weight", "layers.*.attention.key_norm.scale"),
)
