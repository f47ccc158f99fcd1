"""Llama 4, the text model: layers that see a chunk by turns with layers that see all and know no
positions, and experts of which one works on a token beside a shared one.
ai.meta.com/blog/llama-4-multimodal-intelligence

Quirks: the router's weight multiplies what enters an expert; queries and keys are normed after they
are turned; queries of layers without positions grow with the logarithm of the position; RoPE turns
neighbours; published directories hold a model of pictures too.
"""

from typing import Any, ClassVar, NamedTuple, Self

import pydantic
from flax import nnx

from ropewalk.core.errors import ModelError
from ropewalk.core.weights import Fused
from ropewalk.layers import moe
from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Count, Grouped, HeadDim
from ropewalk.layers.lm import LM
from ropewalk.layers.names import decoder_rules, fused_expert_rules, gated_rules
from ropewalk.layers.router import Routing
from ropewalk.layers.stack import pattern


class Kind(NamedTuple):
    """What a layer is."""

    turned: bool
    """whether it knows positions, and sees its chunk only"""
    sparse: bool
    """whether it has experts"""


class Config(Grouped):
    """Hugging Face's names; `intermediate_size` is of an expert."""

    architecture: ClassVar[str] = "Llama4ForCausalLM"
    harmless: ClassVar[frozenset[str]] = frozenset({
        "for_llm_compressor", "output_router_logits", "router_aux_loss_coef",
        "router_jitter_noise",
    })  # fmt: skip

    head_dim: HeadDim = 128
    max_position_embeddings: Count = 131072
    rms_norm_eps: float = pydantic.Field(default=1e-5, gt=0)
    rope_theta: float = pydantic.Field(default=5e5, gt=0)
    attention_bias: bool = False
    intermediate_size_mlp: Count
    """of the MLP of layers without experts"""
    num_local_experts: Count = 16
    num_experts_per_tok: Count = 1
    interleave_moe_layer_step: Count = 1
    """every so many layers one has experts, unless `moe_layers` says otherwise"""
    moe_layers: tuple[int, ...] | None = None
    """which layers have experts"""
    no_rope_layer_interval: Count = 4
    """every so many layers one knows no positions, unless `no_rope_layers` says otherwise"""
    no_rope_layers: tuple[int, ...] | None = None
    """one a layer: 1 where positions are known"""
    attention_chunk_size: Count = 8192
    use_qk_norm: bool = True
    attn_temperature_tuning: bool = True
    floor_scale: Count = 8192
    attn_scale: float = 0.1

    def interleaved(self) -> bool:
        """Neighbours are turned together."""
        return True

    def kinds(self) -> tuple[Kind, ...]:
        """Of every layer."""
        layers, step = range(self.num_hidden_layers), self.interleave_moe_layer_step
        sparse = range(step - 1, len(layers), step) if self.moe_layers is None else self.moe_layers
        every = self.no_rope_layer_interval
        turned = self.no_rope_layers or [(i + 1) % every > 0 for i in layers]
        return tuple(Kind(bool(turned[i]), i in sparse) for i in layers)

    @pydantic.model_validator(mode="after")
    def _counted(self) -> Self:
        layers, said = self.num_hidden_layers, self.no_rope_layers
        if said is not None and len(said) != layers:
            raise ValueError(
                f"no_rope_layers has {len(said)} entries and num_hidden_layers is {layers}; there "
                "is one a layer"
            )
        return self

    @classmethod
    def _read(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        """What the steps say too is not said; `layer_types` must say what they do."""
        values = super()._read(values, source)
        values["attn_temperature_tuning"] = bool(values.get("attn_temperature_tuning", True))
        values["no_rope_layers"] = values.get("no_rope_layers") or None
        kinds = values.pop("layer_types", None)
        plain = cls.parse({k: values[k] for k in values if k in cls.model_fields}, source)
        usual = plain.model_copy(update={"no_rope_layers": None, "moe_layers": None}).kinds()
        found = plain.kinds()
        if kinds is not None and [kind == "chunked_attention" for kind in kinds] != [
            kind.turned for kind in found
        ]:
            raise ModelError(
                f"{source}: layer_types disagrees with no_rope_layers; a layer has chunks exactly "
                "where it knows positions"
            )
        for key, place in (("no_rope_layers", 0), ("moe_layers", 1)):
            if [kind[place] for kind in found] == [kind[place] for kind in usual]:
                values.pop(key, None)
        return values

    def routing(self) -> Routing:
        """How experts are chosen."""
        return Routing(
            self.num_local_experts, self.num_experts_per_tok, score="sigmoid", on_input=True
        )


def block(c: Config, kind: Kind, rngs: nnx.Rngs) -> Block:
    """One layer of a kind."""
    mixer = attention(
        c,
        rngs,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        chunk=c.attention_chunk_size if kind.turned else None,
        rope="default" if kind.turned else None,
        turned_norm_eps=c.rms_norm_eps if kind.turned and c.use_qk_norm else None,
        temperature=(
            (c.floor_scale, c.attn_scale) if c.attn_temperature_tuning and not kind.turned else None
        ),
    )
    if not kind.sparse:
        return Block(c, mixer, mlp(c, rngs, inner=c.intermediate_size_mlp))
    inner = c.intermediate_size
    return Block(c, mixer, moe.experts(c, rngs, c.routing(), inner, shared=inner))


class Model(LM):
    """Layers as their kinds say."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


_SIZES = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}
_STRETCHED = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

PRESETS: dict[str, Config] = {
    "llama4-scout": Config.parse({
        **_SIZES,
        "num_local_experts": 16,
        "max_position_embeddings": 10485760,
        "rope_scaling": _STRETCHED,
    }),
    "llama4-maverick": Config.parse({
        **_SIZES,
        "num_local_experts": 128,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "max_position_embeddings": 1048576,
    }),
}  # fmt: skip

WEIGHTS = (
    *decoder_rules(mlp="feed_forward"),
    *fused_expert_rules("feed_forward.router", "feed_forward.experts", Fused(0, -1), Fused(1, -1)),
    *gated_rules("feed_forward.shared_expert", "mlp.shared"),
)
