"""GPT-3: GPT-2's block in larger sizes, dense attention in every layer. arXiv:2005.14165

It has no twin at Hugging Face: its directories have the tensors of GPT-2 under a `model_type` of
their own.
"""

from typing import ClassVar

from flax import nnx

from ropewalk.layers.block import Block, attention
from ropewalk.layers.config import Positioned
from ropewalk.layers.linear import depth_std
from ropewalk.layers.lm import LM
from ropewalk.layers.mlp import MLP
from ropewalk.layers.names import gpt_rules


class Config(Positioned):
    """Sizes under the names of the other families."""

    architecture: ClassVar[str] = "GPT3LMHeadModel"

    hidden_act: str = "gelu_pytorch_tanh"


def block(c: Config, rngs: nnx.Rngs) -> Block:
    """One layer."""
    mixer = attention(c, rngs, bias=True, out_bias=True, rope=None)
    std = depth_std(c.num_hidden_layers)
    inner = c.intermediate_size
    mlp = MLP(c.hidden_size, inner, activation=c.hidden_act, out_std=std, rngs=rngs)
    return Block(c, mixer, mlp)


class Model(LM):
    """A stack of one segment."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, [([lambda r: block(c, r)], c.num_hidden_layers)], rngs=rngs)


def _sizes(hidden: int, layers: int, heads: int, vocab: int = 50257) -> Config:
    return Config.parse({
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    })  # fmt: skip


PRESETS: dict[str, Config] = {
    "gpt3-52k": _sizes(16, 1, 2, vocab=1024),
    "gpt3-6.7b": _sizes(4096, 32, 32),
    "gpt3-13b": _sizes(5120, 40, 40),
    "gpt3-175b": _sizes(12288, 96, 96),
}

WEIGHTS = gpt_rules()
