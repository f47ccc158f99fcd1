"""DeepSeek-V2: latent attention, fine experts chosen by softmax scores beside shared ones, dense
layers first. arXiv:2405.04434

Quirks: the weights of the chosen experts do not sum to one; the large model chooses groups of
experts first; YaRN's temperature is in the scores and not in the rotation.
"""

from typing import Any, ClassVar, Literal

from flax import nnx

from ropewalk.layers import moe
from ropewalk.layers.block import Block, mlp
from ropewalk.layers.config import Count
from ropewalk.layers.lm import LM
from ropewalk.layers.mla import LatentConfig, attention_of
from ropewalk.layers.names import decoder_rules, expert_rules, gated_rules, latent_rules
from ropewalk.layers.router import Routing
from ropewalk.layers.stack import pattern


class Config(LatentConfig):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "DeepseekV2ForCausalLM"
    only: ClassVar[dict[str, tuple[Any, ...]]] = {
        "scoring_func": ("softmax", None),
        "norm_topk_prob": (False, None),
        "moe_layer_freq": (1, None),
    }

    n_shared_experts: Count = 2
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    """whether groups of experts are chosen first"""
    mlp_bias: bool = False

    def routing(self) -> Routing:
        """How experts are chosen."""
        grouped = self.topk_method == "group_limited_greedy"
        return Routing(
            self.n_routed_experts,
            self.num_experts_per_tok,
            groups=(grouped and self.n_group) or 1,
            top_groups=(grouped and self.topk_group) or 1,
            scaling=self.routed_scaling_factor,
        )


def block(c: Config, kind: str, rngs: nnx.Rngs) -> Block:
    """One layer of a kind."""
    mixer = attention_of(c, rngs)
    if kind == "dense":
        return Block(c, mixer, mlp(c, rngs, bias=c.mlp_bias))
    shared = c.n_shared_experts * c.moe_intermediate_size
    experts = moe.experts(
        c, rngs, c.routing(), c.moe_intermediate_size, shared=shared, shared_bias=c.mlp_bias
    )
    return Block(c, mixer, experts)


class Model(LM):
    """Dense layers, then layers of experts."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


def _sizes(**values: Any) -> Config:
    yarn = {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
    return Config.parse({
        "vocab_size": 102400,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 163840,
        "rope_scaling": yarn,
        **values,
    })  # fmt: skip


PRESETS: dict[str, Config] = {
    "deepseek-v2-lite": _sizes(
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        n_routed_experts=64,
    ),
    "deepseek-v2": _sizes(
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        num_attention_heads=128,
        n_routed_experts=160,
        q_lora_rank=1536,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        routed_scaling_factor=16.0,
    ),
}

WEIGHTS = (
    *decoder_rules(),
    *latent_rules(),
    *expert_rules(),
    *gated_rules("mlp.shared_experts", "mlp.shared"),
)
