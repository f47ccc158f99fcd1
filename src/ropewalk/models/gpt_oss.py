"""gpt-oss: experts with biases and a clipped gate, heads with attention sinks, layers that see a
window by turns with layers that see all. arXiv:2508.10925

Quirks: the weights of an expert's gate and up lie column by column in turns, in MXFP4 in the
published files; a directory that says nothing of RoPE means YaRN by 32.
"""

from typing import Any, ClassVar

import pydantic
from flax import nnx

from ropewalk.core.weights import Fused
from ropewalk.layers import moe, rope
from ropewalk.layers.block import Block, attention
from ropewalk.layers.config import Count, HeadDim, Windowed
from ropewalk.layers.lm import LM
from ropewalk.layers.names import decoder_rules, fused_expert_rules
from ropewalk.layers.router import Routing
from ropewalk.layers.stack import pattern

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


class Config(Windowed):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "GptOssForCausalLM"
    full_every: ClassVar[int] = 2
    harmless: ClassVar[frozenset[str]] = frozenset({
        "experts_per_token", "initial_context_length", "output_router_logits",
        "router_aux_loss_coef",
    })  # fmt: skip

    head_dim: HeadDim = 64
    max_position_embeddings: Count = 131072
    rms_norm_eps: float = pydantic.Field(default=1e-5, gt=0)
    rope_theta: float = pydantic.Field(default=150_000.0, gt=0)
    rope_scaling: rope.Scaling = rope.Yarn.parse(_YARN, "gpt-oss")
    attention_bias: bool = True
    sliding_window: Count | None = 128
    num_local_experts: Count = 32
    num_experts_per_tok: Count = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = pydantic.Field(default=7.0, gt=0)

    @classmethod
    def _read(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        experts = values.pop("num_experts", None)
        if experts is not None:
            values.setdefault("num_local_experts", experts)
        if (values.get("quantization_config") or {}).get("quant_method") == "mxfp4":
            del values["quantization_config"]  # the weights are given as numbers
        if not values.get("rope_parameters") and not values.get("rope_scaling"):
            values["rope_scaling"] = _YARN
        return super()._read(values, source)

    def to_hf(self) -> dict[str, Any]:
        """As `Windowed.to_hf`; plain RoPE has to be said."""
        return {**super().to_hf(), "rope_scaling": self.rope_scaling.model_dump(mode="json")}

    def routing(self) -> Routing:
        """How experts are chosen."""
        return Routing(
            self.num_local_experts, self.num_experts_per_tok, logit_bias=True, renormalise=True
        )


def block(c: Config, kind: str, rngs: nnx.Rngs) -> Block:
    """One layer of a kind."""
    mixer = attention(
        c,
        rngs,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        sinks=True,
        window=c.window(kind),
    )
    act = moe.clipped(c.swiglu_alpha, c.swiglu_limit)
    experts = moe.experts(c, rngs, c.routing(), c.intermediate_size, act=act, bias=True)
    return Block(c, mixer, experts)


class Model(LM):
    """Pairs of a layer with a window and one without."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


def _sizes(layers: int, experts: int) -> Config:
    return Config.parse({
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
    })  # fmt: skip


PRESETS: dict[str, Config] = {
    "gpt-oss-20b": _sizes(24, 32),
    "gpt-oss-120b": _sizes(36, 128),
}

_TURNS = [Fused(place, -1, groups=lambda shape: shape[-1]) for place in (0, 1)]
WEIGHTS = (
    *decoder_rules(),
    *fused_expert_rules("mlp.router", "mlp.experts", *_TURNS),
)
