"""Llama 2, 3, 3.1, 3.2, 3.3 and SmolLM2: RMS norm before each part, grouped-query attention,
SwiGLU, rotary positions.

arXiv:2307.09288, arXiv:2407.21783. Quirks: Llama 3.1 and later stretch RoPE (`rope_scaling`), the
small ones tie their head, and GGUF files hold query and key rows with the pairs of RoPE
interleaved.
"""

from typing import Any, ClassVar

from flax import nnx

from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Grouped
from ropewalk.layers.lm import LM
from ropewalk.layers.names import decoder_rules


class Config(Grouped):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "LlamaForCausalLM"
    gguf_architecture: ClassVar[str] = "llama"

    attention_bias: bool = False
    mlp_bias: bool = False


def block(c: Config, rngs: nnx.Rngs) -> Block:
    """One layer."""
    biases = {"bias": c.attention_bias, "out_bias": c.attention_bias}
    return Block(c, attention(c, rngs, **biases), mlp(c, rngs, bias=c.mlp_bias))


class Model(LM):
    """A stack of one segment."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, [([lambda r: block(c, r)], c.num_hidden_layers)], rngs=rngs)


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Config:
    return Config.parse({
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        **more,
    })  # fmt: skip


def _stretched(factor: float) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "rope_scaling": scaling,
    }


_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 5e5}
_SMOLLM2 = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}

PRESETS: dict[str, Config] = {
    "llama2-7b": _sizes(4096, 11008, 32, 32, 32, **_LLAMA2),
    "llama2-13b": _sizes(5120, 13824, 40, 40, 40, **_LLAMA2),
    "llama2-70b": _sizes(8192, 28672, 80, 64, 8, **_LLAMA2),
    "llama3-8b": _sizes(4096, 14336, 32, 32, 8, **_LLAMA3),
    "llama3-70b": _sizes(8192, 28672, 80, 64, 8, **_LLAMA3),
    "llama3.1-8b": _sizes(4096, 14336, 32, 32, 8, **_stretched(8)),
    "llama3.1-70b": _sizes(8192, 28672, 80, 64, 8, **_stretched(8)),
    "llama3.1-405b": _sizes(16384, 53248, 126, 128, 8, **_stretched(8)),
    "llama3.2-1b": _sizes(
        2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True, **_stretched(32)
    ),
    "llama3.2-3b": _sizes(
        3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True, **_stretched(32)
    ),
    "llama3.3-70b": _sizes(8192, 28672, 80, 64, 8, **_stretched(8)),
    "smollm2-135m": _sizes(576, 1536, 30, 9, 3, **_SMOLLM2),
    "smollm2-360m": _sizes(960, 2560, 32, 15, 5, **_SMOLLM2),
    "smollm2-1.7b": _sizes(2048, 8192, 24, 32, 32, **{**_SMOLLM2, "rope_theta": 130_000.0}),
}

WEIGHTS = decoder_rules(gguf_pairs="rope_pairs")
