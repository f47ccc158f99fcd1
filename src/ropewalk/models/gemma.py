"""Gemma: Llama's block with GELU, norm scales stored around one, heads wider than their share, and
embedded tokens multiplied by the root of the hidden size. arXiv:2403.08295"""

import math
from typing import Any, ClassVar

from flax import nnx

from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Count, Grouped, HeadDim
from ropewalk.layers.lm import LM
from ropewalk.layers.names import decoder_rules


class Config(Grouped):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "GemmaForCausalLM"
    gguf_architecture: ClassVar[str] = "gemma"
    activations: ClassVar[tuple[str, ...]] = ("gelu_pytorch_tanh", "gelu")
    around_one: ClassVar[bool] = True

    head_dim: HeadDim = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: Count = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False

    def embed_scale(self) -> float:
        """The root of the hidden size."""
        return math.sqrt(self.hidden_size)


def block(c: Config, rngs: nnx.Rngs) -> Block:
    """One layer."""
    biases = {"bias": c.attention_bias, "out_bias": c.attention_bias}
    return Block(c, attention(c, rngs, **biases), mlp(c, rngs))


class Model(LM):
    """A stack of one segment."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, [([lambda r: block(c, r)], c.num_hidden_layers)], rngs=rngs)


def _sizes(**values: Any) -> Config:
    return Config.parse({"vocab_size": 256000, **values})


PRESETS: dict[str, Config] = {
    "gemma-2b": _sizes(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
    ),
    "gemma-7b": _sizes(
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
    ),
}

WEIGHTS = decoder_rules(gguf_norms="plus_one")
