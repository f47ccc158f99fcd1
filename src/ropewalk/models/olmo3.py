"""OLMo 3: OLMo 2's block, three layers with a window to one that sees all; YaRN stretches the
latter only. arXiv:2512.13961"""

from typing import Any, ClassVar

import pydantic
from flax import nnx

from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Count, TwoRopes
from ropewalk.layers.lm import LM
from ropewalk.layers.names import POST_NORMS, decoder_rules
from ropewalk.layers.stack import pattern


class Config(TwoRopes):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "Olmo3ForCausalLM"
    full_every: ClassVar[int] = 4

    rms_norm_eps: float = pydantic.Field(default=1e-5, gt=0)
    rope_theta: float = pydantic.Field(default=5e5, gt=0)
    attention_bias: bool = False
    sliding_window: Count | None = 4096


def block(c: Config, kind: str, rngs: nnx.Rngs) -> Block:
    """One layer of a kind."""
    mixer = attention(
        c,
        rngs,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        norm_eps=c.rms_norm_eps,
        norm_over="all",
        window=c.window(kind),
        rope=kind,
    )
    return Block(c, mixer, mlp(c, rngs), pre=False, post=True)


class Model(LM):
    """Units of four layers, and what is left of one."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Config:
    sizes: dict[str, Any] = {
        "vocab_size": 100278,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "attention_factor": 1.2079441541679836,
        },
    }
    return Config.parse(sizes)


PRESETS: dict[str, Config] = {
    "olmo3-7b": _sizes(4096, 11008, 32, 32, 32),
    "olmo3-32b": _sizes(5120, 27648, 64, 40, 8),
}

WEIGHTS = decoder_rules(norms=POST_NORMS)
