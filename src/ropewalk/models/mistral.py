"""Mistral 7B and its successors: Llama's block without biases; the first version's queries see a
window of the last keys. arXiv:2310.06825"""

from typing import Any, ClassVar

from flax import nnx

from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Count, Grouped
from ropewalk.layers.lm import LM
from ropewalk.layers.names import decoder_rules


class Config(Grouped):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "MistralForCausalLM"

    max_position_embeddings: Count = 131072
    sliding_window: Count | None = None
    """how many of the last keys a query sees; all where it is None"""


def block(c: Config, rngs: nnx.Rngs) -> Block:
    """One layer."""
    return Block(c, attention(c, rngs, window=c.sliding_window), mlp(c, rngs))


class Model(LM):
    """A stack of one segment."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, [([lambda r: block(c, r)], c.num_hidden_layers)], rngs=rngs)


def _sizes(**changes: Any) -> Config:
    return Config.parse({
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        **changes,
    })  # fmt: skip


PRESETS: dict[str, Config] = {
    "mistral-7b": _sizes(vocab_size=32000, rope_theta=1e4, sliding_window=4096),
    "mistral-7b-v0.3": _sizes(vocab_size=32768),
    "mistral-nemo-12b": _sizes(
        vocab_size=131072, hidden_size=5120, num_hidden_layers=40, max_position_embeddings=131072
    ),
}

WEIGHTS = decoder_rules()
