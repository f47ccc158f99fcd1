"""Qwen3 (dense): pre-norm blocks with SwiGLU, and an RMS norm on every query and key head in place
of biases. arXiv:2505.09388"""

from typing import ClassVar

import pydantic
from flax import nnx

from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import HeadDim, LateWindows
from ropewalk.layers.lm import LM
from ropewalk.layers.names import decoder_rules
from ropewalk.layers.stack import pattern


class Config(LateWindows):
    """Hugging Face's names; a head has 128 features whatever the hidden size."""

    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    gguf_architecture: ClassVar[str] = "qwen3"

    head_dim: HeadDim = 128
    max_position_embeddings: pydantic.PositiveInt = 40960
    rope_theta: pydantic.PositiveFloat = 1e6
    attention_bias: bool = False


def block(c: Config, kind: str, rngs: nnx.Rngs) -> Block:
    """One layer of a kind."""
    mixer = attention(
        c,
        rngs,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        norm_eps=c.rms_norm_eps,
        window=c.window(kind),
    )
    return Block(c, mixer, mlp(c, rngs))


class Model(LM):
    """Layers as their kinds say."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


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

WEIGHTS = decoder_rules()
