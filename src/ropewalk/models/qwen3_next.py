"""Qwen3-Next: three layers of Gated DeltaNet to one of attention with an output gate, many fine
experts beside a shared one that has a gate of its own. arXiv:2412.06464, arXiv:2505.09388

Quirks: RoPE turns a quarter of a head; norm scales are stored as their distance from one, but for
the norm within a delta layer; files interleave its projections by key head, and hold a layer that
predicts further tokens, which is left out.
"""

import math
from typing import Any, ClassVar, Literal, Self

import pydantic
from flax import nnx

from ropewalk.core.weights import LINEAR_OUT, Fused, Op, Rule
from ropewalk.layers import moe
from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Count, Grouped, HeadDim
from ropewalk.layers.delta import GatedDelta, Spec
from ropewalk.layers.linear import depth_std
from ropewalk.layers.lm import LM
from ropewalk.layers.names import decoder_rules, expert_rules, gated_rules, linear
from ropewalk.layers.router import Routing
from ropewalk.layers.stack import pattern


class Config(Grouped):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "Qwen3NextForCausalLM"
    around_one: ClassVar[bool] = True
    harmless: ClassVar[frozenset[str]] = frozenset({
        "output_router_logits", "router_aux_loss_coef",
    })  # fmt: skip

    head_dim: HeadDim = 256
    max_position_embeddings: Count = 32768
    partial_rotary_factor: float = pydantic.Field(default=0.25, gt=0, le=1)
    """how much of a head RoPE turns"""
    attention_bias: bool = False
    full_attention_interval: Count = 4
    """every so many layers there is one of attention, where `layer_types` does not say otherwise"""
    layer_types: tuple[Literal["linear_attention", "full_attention"], ...] | None = None
    """one a layer"""
    linear_conv_kernel_dim: Count = 4
    linear_key_head_dim: Count = 128
    linear_value_head_dim: Count = 128
    linear_num_key_heads: Count = 16
    linear_num_value_heads: Count = 32
    decoder_sparse_step: Count = 1
    """every so many layers there is one of experts, but for `mlp_only_layers`"""
    mlp_only_layers: tuple[int, ...] = ()
    num_experts: Count = 512
    num_experts_per_tok: Count = 10
    moe_intermediate_size: Count = 512
    shared_expert_intermediate_size: Count = 512
    norm_topk_prob: bool = True

    @pydantic.model_validator(mode="before")
    @classmethod
    def _usual(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A pattern is the same said by its interval or layer by layer."""
        kinds = tuple(values.get("layer_types") or ())
        said = values.get("full_attention_interval") or 4
        first = kinds.index("full_attention") + 1 if "full_attention" in kinds else said
        whole = len(kinds) == values.get("num_hidden_layers")
        for interval in (said, first):
            if whole and kinds == _every(interval, len(kinds)):
                return {**values, "full_attention_interval": interval, "layer_types": None}
        return values

    @pydantic.model_validator(mode="after")
    def _delta_fits(self) -> Self:
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries and num_hidden_layers is "
                f"{self.num_hidden_layers}; there is one a layer"
            )
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"linear_num_value_heads = {self.linear_num_value_heads} is not a multiple of "
                f"linear_num_key_heads = {self.linear_num_key_heads}"
            )
        if self.rotary_dim() % 2 or not self.rotary_dim():
            raise ValueError(
                f"partial_rotary_factor = {self.partial_rotary_factor} of head_dim = "
                f"{self.head_dim} are {self.rotary_dim()} features; RoPE turns them in pairs"
            )
        return self

    def rotary_dim(self) -> int:
        """A part of the head."""
        return int(self.head_dim * self.partial_rotary_factor)

    def kinds(self) -> tuple[tuple[str, str], ...]:
        """Of every layer, what mixes its tokens, and whether it has experts."""
        step, only = self.decoder_sparse_step, self.mlp_only_layers
        mixers = self.layer_types or _every(self.full_attention_interval, self.num_hidden_layers)
        return tuple(
            (mixer, "dense" if i in only or (i + 1) % step else "experts")
            for i, mixer in enumerate(mixers)
        )

    def unused(self) -> tuple[str, ...]:
        """The layer that predicts further tokens."""
        return ("mtp.*",)

    def to_hf(self) -> dict[str, Any]:
        """As `Grouped.to_hf`, with every layer's type."""
        return {**super().to_hf(), "layer_types": [mixer for mixer, _ in self.kinds()]}


def block(c: Config, kind: tuple[str, str], rngs: nnx.Rngs) -> Block:
    """One layer of a kind."""
    mixer = _delta(c, rngs) if kind[0] == "linear_attention" else _attention(c, rngs)
    return Block(c, mixer, mlp(c, rngs) if kind[1] == "dense" else _experts(c, rngs))


class Model(LM):
    """Units of four layers, and what is left of one."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


def _every(interval: int, layers: int) -> tuple[str, ...]:
    return tuple(
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
    )


def _delta(c: Config, rngs: nnx.Rngs) -> GatedDelta:
    spec = Spec(
        c.hidden_size,
        key_heads=c.linear_num_key_heads,
        value_heads=c.linear_num_value_heads,
        key_dim=c.linear_key_head_dim,
        value_dim=c.linear_value_head_dim,
        width=c.linear_conv_kernel_dim,
        norm_eps=c.rms_norm_eps,
        out_std=depth_std(c.num_hidden_layers),
    )
    return GatedDelta(spec, rngs=rngs)


def _attention(c: Config, rngs: nnx.Rngs) -> Any:
    bias = c.attention_bias
    return attention(c, rngs, bias=bias, out_bias=bias, norm_eps=c.rms_norm_eps, gate=True)


def _experts(c: Config, rngs: nnx.Rngs) -> moe.MoE:
    routing = Routing(c.num_experts, c.num_experts_per_tok, renormalise=c.norm_topk_prob)
    shared = c.shared_expert_intermediate_size
    return moe.experts(c, rngs, routing, c.moe_intermediate_size, shared=shared, shared_gate=True)


PRESETS: dict[str, Config] = {
    "qwen3-next-80b-a3b": Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5120,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=262144,
        rope_theta=1e7,
    ),
}

# [features, 1, w] in the file, as torch counts a convolution of every feature by itself; [n, h, w]
# in ours.
_FILTER = Op(
    lambda shape: (math.prod(shape[:-1]), 1, shape[-1]),
    lambda tensor, shape: tensor.reshape(shape),
    lambda array: array.reshape(-1, 1, array.shape[-1]),
)


def _by_head(place: int) -> Fused:
    """The share of a head after a head: weights are [d, n, h], biases [n, h]."""
    return Fused(place, groups=lambda shape: shape[-2])


def _delta_rules() -> tuple[Rule, ...]:
    theirs, ours = "model.layers.{i}.linear_attn", "layers.*.attention"
    products = {
        "in_proj_qkvz": ("query.project", "key.project", "value.project", "norm_gate"),
        "in_proj_ba": ("beta", "decay"),
    }
    return (
        *(
            rule
            for name, parts in products.items()
            for place, part in enumerate(parts)
            for rule in linear(f"linear_attn.{name}", f"attention.{part}", fused=_by_head(place))
        ),
        *(
            Rule(f"{theirs}.conv1d.weight", f"{ours}.{part}.filter", _FILTER, fused=Fused(place))
            for place, part in enumerate(("query", "key", "value"))
        ),
        Rule(f"{theirs}.A_log", f"{ours}.a_log"),
        Rule(f"{theirs}.dt_bias", f"{ours}.dt_bias"),
        Rule(f"{theirs}.norm.weight", f"{ours}.norm.scale"),
        *linear("linear_attn.out_proj", "attention.readout", LINEAR_OUT),
    )


WEIGHTS = (
    *(rule for rule in decoder_rules() if ".q_proj." not in rule.source),
    *linear("self_attn.q_proj", "attention.query", fused=_by_head(0)),
    *linear("self_attn.q_proj", "attention.gate", fused=_by_head(1)),
    *_delta_rules(),
    *expert_rules(),
    *gated_rules("mlp.shared_expert", "mlp.shared"),
    *linear("mlp.shared_expert_gate", "mlp.shared_gate"),
)
