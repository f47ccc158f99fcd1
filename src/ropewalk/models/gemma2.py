"""Gemma 2: Gemma's block with a norm after each part too, scores and logits bounded by a tanh, and
layers that see a window by turns with layers that see all. arXiv:2408.00118"""

import math
from typing import Any, ClassVar, Self

import pydantic
from flax import nnx

from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Count, HeadDim, Windowed
from ropewalk.layers.lm import LM
from ropewalk.layers.names import ALL_NORMS, decoder_rules
from ropewalk.layers.stack import pattern


class Config(Windowed):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "Gemma2ForCausalLM"
    gguf_architecture: ClassVar[str] = "gemma2"
    activations: ClassVar[tuple[str, ...]] = ("gelu_pytorch_tanh", "gelu")
    spelt: ClassVar[dict[str, str]] = {"hidden_act": "hidden_activation"}
    around_one: ClassVar[bool] = True
    full_every: ClassVar[int] = 2

    head_dim: HeadDim = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: Count = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    sliding_window: Count | None = 4096
    query_pre_attn_scalar: Count = 256
    """scores are divided by its root"""
    attn_logit_softcapping: float | None = pydantic.Field(default=50.0, gt=0)
    final_logit_softcapping: float | None = pydantic.Field(default=30.0, gt=0)

    def embed_scale(self) -> float:
        """The root of the hidden size."""
        return math.sqrt(self.hidden_size)

    def logit_cap(self) -> float | None:
        """Bound of the logits."""
        return self.final_logit_softcapping

    @classmethod
    def from_gguf(cls, values: dict[str, Any], source: str) -> Self:
        """As `LMConfig.from_gguf`. Files leave `query_pre_attn_scalar` out: it is the size of a
        head, but in the 27B model, known by its layers, a head's share of the hidden features."""
        share = values["hidden_size"] // values["num_attention_heads"]
        scalar = share if values["num_hidden_layers"] == 46 else values["head_dim"]
        return cls.from_hf({**values, "query_pre_attn_scalar": scalar}, source)


def block(c: Config, kind: str, rngs: nnx.Rngs) -> Block:
    """One layer of a kind."""
    mixer = attention(
        c,
        rngs,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        scale=c.query_pre_attn_scalar**-0.5,
        soft_cap=c.attn_logit_softcapping,
        window=c.window(kind),
    )
    return Block(c, mixer, mlp(c, rngs), post=True)


class Model(LM):
    """Pairs of a layer with a window and one without."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Config:
    return Config.parse({
        "vocab_size": 256000,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    })  # fmt: skip


PRESETS: dict[str, Config] = {
    "gemma2-2b": _sizes(2304, 9216, 26, 8, 4),
    "gemma2-9b": _sizes(3584, 14336, 42, 16, 8),
    "gemma2-27b": _sizes(4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
}

WEIGHTS = decoder_rules(gguf_norms="plus_one", norms=ALL_NORMS)
