"""Qwen2 and Qwen2.5: Llama's block with biases on queries, keys and values alone.
arXiv:2407.10671, arXiv:2412.15115"""

from typing import ClassVar

from flax import nnx

from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Count, LateWindows
from ropewalk.layers.lm import LM
from ropewalk.layers.names import decoder_rules
from ropewalk.layers.stack import pattern


class Config(LateWindows):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    gguf_architecture: ClassVar[str] = "qwen2"

    max_position_embeddings: Count = 32768


def block(c: Config, kind: str, rngs: nnx.Rngs) -> Block:
    """One layer of a kind."""
    return Block(c, attention(c, rngs, bias=True, window=c.window(kind)), mlp(c, rngs))


class Model(LM):
    """Layers as their kinds say."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


def _sizes(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> Config:
    return Config.parse({
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
    })  # fmt: skip


PRESETS: dict[str, Config] = {
    "qwen2.5-0.5b": _sizes(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": _sizes(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-3b": _sizes(2048, 11008, 36, 16, 2, 151936, tied=True),
    "qwen2.5-7b": _sizes(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b": _sizes(5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b": _sizes(5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": _sizes(8192, 29568, 80, 64, 8, 152064),
}

WEIGHTS = decoder_rules()
