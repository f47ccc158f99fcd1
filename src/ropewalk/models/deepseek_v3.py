"""DeepSeek-V3, R1 and Kimi-K2: latent attention, fine experts beside a shared one chosen by
sigmoid scores within groups, a selection bias in place of a loss. arXiv:2412.19437,
arXiv:2507.20534

Quirks: the bias enters the choice and never the weights; the features that RoPE turns together are
neighbours; published files hold a layer beyond the last.
"""

from typing import Any, ClassVar

from flax import nnx

from ropewalk.layers import moe
from ropewalk.layers.block import Block, mlp
from ropewalk.layers.config import Count
from ropewalk.layers.lm import LM
from ropewalk.layers.mla import LatentConfig, attention_of
from ropewalk.layers.names import (
    decoder_rules,
    expert_rules,
    gated_rules,
    latent_rules,
    selection_bias_rule,
)
from ropewalk.layers.router import Routing
from ropewalk.layers.stack import pattern

ALSO = ("kimi_k2",)


class Config(LatentConfig):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "DeepseekV3ForCausalLM"
    only: ClassVar[dict[str, tuple[Any, ...]]] = {
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "moe_layer_freq": (1, None),
    }

    q_lora_rank: Count | None = 1536
    n_shared_experts: Count = 1
    n_group: Count | None = 8
    topk_group: Count | None = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5

    def routing(self) -> Routing:
        """How experts are chosen."""
        return Routing(
            self.n_routed_experts,
            self.num_experts_per_tok,
            score="sigmoid",
            selection_bias=True,
            groups=self.n_group or 1,
            top_groups=self.topk_group or 1,
            group_score="best_two",
            renormalise=self.norm_topk_prob,
            scaling=self.routed_scaling_factor,
        )


def block(c: Config, kind: str, rngs: nnx.Rngs) -> Block:
    """One layer of a kind."""
    mixer = attention_of(c, rngs)
    if kind == "dense":
        return Block(c, mixer, mlp(c, rngs))
    shared = c.n_shared_experts * c.moe_intermediate_size
    experts = moe.experts(c, rngs, c.routing(), c.moe_intermediate_size, shared=shared)
    return Block(c, mixer, experts)


class Model(LM):
    """Dense layers, then layers of experts."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


_SIZES = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_experts_per_tok": 8,
}
_YARN = {
    "rope_type": "yarn",
    "original_max_position_embeddings": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

PRESETS: dict[str, Config] = {
    "deepseek-v3": Config.parse({
        **_SIZES,
        "vocab_size": 129280,
        "num_attention_heads": 128,
        "n_routed_experts": 256,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 163840,
        "rope_scaling": {**_YARN, "factor": 40.0},
    }),
    "kimi-k2": Config.parse({
        **_SIZES,
        "vocab_size": 163840,
        "num_attention_heads": 64,
        "n_routed_experts": 384,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "max_position_embeddings": 131072,
        "rope_theta": 5e4,
        "rope_scaling": {**_YARN, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
    }),
}  # fmt: skip

WEIGHTS = (
    *decoder_rules(),
    *latent_rules(),
    *expert_rules(),
    *gated_rules("mlp.shared_experts", "mlp.shared"),
    selection_bias_rule("mlp.gate.e_score_correction_bias"),
)
