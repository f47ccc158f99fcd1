"""Gemma 3, the text model: Gemma 2's block with norms on queries and keys in place of the bounds;
five layers with a window and a RoPE base of their own to one that sees all. arXiv:2503.19786"""

import math
from typing import Any, ClassVar, Self

import pydantic
from flax import nnx

from ropewalk.core.errors import ModelError
from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Count, HeadDim, TwoRopes
from ropewalk.layers.lm import LM
from ropewalk.layers.names import ALL_NORMS, decoder_rules
from ropewalk.layers.stack import pattern


class Config(TwoRopes):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    gguf_architecture: ClassVar[str] = "gemma3"
    activations: ClassVar[tuple[str, ...]] = ("gelu_pytorch_tanh", "gelu")
    spelt: ClassVar[dict[str, str]] = {"hidden_act": "hidden_activation"}
    around_one: ClassVar[bool] = True
    full_every: ClassVar[int] = 6

    head_dim: HeadDim = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: Count = 131072
    rope_theta: float = pydantic.Field(default=1e6, gt=0)
    """of layers that see all; `rope_scaling` is theirs too"""
    rope_local_base_freq: float = pydantic.Field(default=10_000.0, gt=0)
    """of layers with a window"""
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    sliding_window: Count | None = 4096
    query_pre_attn_scalar: Count = 256
    """scores are divided by its root"""
    attn_logit_softcapping: float | None = pydantic.Field(default=None, gt=0)
    final_logit_softcapping: float | None = pydantic.Field(default=None, gt=0)

    def embed_scale(self) -> float:
        """The root of the hidden size."""
        return math.sqrt(self.hidden_size)

    def local_theta(self) -> float:
        """The base of layers with a window."""
        return self.rope_local_base_freq

    def logit_cap(self) -> float | None:
        """Bound of the logits."""
        return self.final_logit_softcapping

    @classmethod
    def _read(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        period = values.pop("_sliding_window_pattern", values.pop("sliding_window_pattern", 6))
        if not values.get("layer_types") and period != cls.full_every:
            raise ModelError(
                f"{source}: sliding_window_pattern = {period} and no layer_types; say each layer's "
                "type in layer_types"
            )
        return super()._read(values, source)

    @classmethod
    def from_gguf(cls, values: dict[str, Any], source: str) -> Self:
        """As `LMConfig.from_gguf`. Without a window all layers see all. Files leave
        `query_pre_attn_scalar` out: it is the size of a head, but in the 27B model, known by its
        layers, a head's share of the hidden features."""
        layers, heads = values["num_hidden_layers"], values["num_attention_heads"]
        scalar = values["hidden_size"] // heads if layers == 62 else values["head_dim"]
        values = {**values, "query_pre_attn_scalar": scalar}
        if "sliding_window" not in values:
            values["layer_types"] = ["full_attention"] * layers
        return cls.from_hf(values, source)


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
        rope=kind,
        norm_eps=c.rms_norm_eps,
    )
    return Block(c, mixer, mlp(c, rngs), post=True)


class Model(LM):
    """Units of six layers, and what is left of one."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Config:
    return Config.parse({
        "vocab_size": 262208,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "sliding_window": 1024,
        **more,
    })  # fmt: skip


_SMALL = {"vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768}
_STRETCHED = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}

PRESETS: dict[str, Config] = {
    "gemma3-270m": _sizes(640, 2048, 18, 4, 1, **_SMALL),
    "gemma3-1b": _sizes(1152, 6912, 26, 4, 1, **_SMALL),
    "gemma3-4b": _sizes(2560, 10240, 34, 8, 4, **_STRETCHED),
    "gemma3-12b": _sizes(3840, 15360, 48, 16, 8, **_STRETCHED),
    "gemma3-27b": _sizes(
        5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168, **_STRETCHED
    ),
}

WEIGHTS = decoder_rules(gguf_norms="plus_one", norms=ALL_NORMS)
