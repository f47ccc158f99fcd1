"""OLMo 2: norms after each part and none before it, and an RMS norm over all queries and all keys
of a token at once. arXiv:2501.00656"""

from typing import Any, ClassVar

import pydantic
from flax import nnx

from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Grouped
from ropewalk.layers.lm import LM
from ropewalk.layers.names import POST_NORMS, decoder_rules


class Config(Grouped):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "Olmo2ForCausalLM"

    rms_norm_eps: float = pydantic.Field(default=1e-5, gt=0)
    attention_bias: bool = False


def block(c: Config, rngs: nnx.Rngs) -> Block:
    """One layer."""
    mixer = attention(
        c,
        rngs,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        norm_eps=c.rms_norm_eps,
        norm_over="all",
    )
    return Block(c, mixer, mlp(c, rngs), pre=False, post=True)


class Model(LM):
    """A stack of one segment."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, [([lambda r: block(c, r)], c.num_hidden_layers)], rngs=rngs)


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Config:
    sizes: dict[str, Any] = {
        "vocab_size": 100352,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
    }
    return Config.parse(sizes)


PRESETS: dict[str, Config] = {
    "olmo2-1b": _sizes(2048, 8192, 16, 16, 16),
    "olmo2-7b": _sizes(4096, 11008, 32, 32, 32),
    "olmo2-13b": _sizes(5120, 13824, 40, 40, 40),
    "olmo2-32b": _sizes(5120, 27648, 64, 40, 8),
}

WEIGHTS = decoder_rules(norms=POST_NORMS)
