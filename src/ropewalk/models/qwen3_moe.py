"""Qwen3 with experts: Qwen3's block, 128 experts in place of the MLP, eight of them a token.
arXiv:2505.09388

Quirk: layers without experts may stand between (`decoder_sparse_step`, `mlp_only_layers`).
"""

from typing import Any, ClassVar

import pydantic
from flax import nnx

from ropewalk.layers import moe
from ropewalk.layers.block import Block, attention, mlp
from ropewalk.layers.config import Count, Grouped
from ropewalk.layers.lm import LM
from ropewalk.layers.names import decoder_rules, expert_rules
from ropewalk.layers.router import Routing
from ropewalk.layers.stack import pattern


class Config(Grouped):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    harmless: ClassVar[frozenset[str]] = frozenset({
        "output_router_logits", "router_aux_loss_coef",
    })  # fmt: skip

    max_position_embeddings: Count = 32768
    rope_theta: float = pydantic.Field(default=1e6, gt=0)
    attention_bias: bool = False
    sliding_window: Count | None = None
    """how many of the last keys a query sees; all where it is None"""
    moe_intermediate_size: Count = 768
    num_experts: Count = 128
    num_experts_per_tok: Count = 8
    norm_topk_prob: bool = False
    """whether the weights of a token's experts sum to one"""
    decoder_sparse_step: Count = 1
    """every so many layers one has experts"""
    mlp_only_layers: tuple[int, ...] = ()
    """layers without experts in any case"""

    @classmethod
    def _read(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        experts = values.pop("num_local_experts", None)
        if experts is not None:
            values.setdefault("num_experts", experts)
        if not values.pop("use_sliding_window", False):
            values["sliding_window"] = None
        return super()._read(values, source)

    def to_hf(self) -> dict[str, Any]:
        """As `Grouped.to_hf`."""
        return {**super().to_hf(), "use_sliding_window": self.sliding_window is not None}

    def kinds(self) -> tuple[str, ...]:
        """Of every layer."""
        step, dense = self.decoder_sparse_step, self.mlp_only_layers
        layers = range(self.num_hidden_layers)
        return tuple("moe" if (i + 1) % step == 0 and i not in dense else "dense" for i in layers)

    def routing(self) -> Routing:
        """How experts are chosen."""
        top, renormalise = self.num_experts_per_tok, self.norm_topk_prob
        return Routing(self.num_experts, top, renormalise=renormalise)


def block(c: Config, kind: str, rngs: nnx.Rngs) -> Block:
    """One layer of a kind."""
    mixer = attention(
        c,
        rngs,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        norm_eps=c.rms_norm_eps,
        window=c.sliding_window,
    )
    if kind == "dense":
        return Block(c, mixer, mlp(c, rngs))
    return Block(c, mixer, moe.experts(c, rngs, c.routing(), c.moe_intermediate_size))


class Model(LM):
    """Layers as their kinds say."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.kinds(), lambda kind, r: block(c, kind, r)), rngs=rngs)


def _sizes(hidden: int, inner: int, expert: int, layers: int, heads: int, **more: Any) -> Config:
    return Config.parse({
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "moe_intermediate_size": expert,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "norm_topk_prob": True,
        **more,
    })  # fmt: skip


_CODER = {"rope_theta": 1e7, "max_position_embeddings": 262144}

PRESETS: dict[str, Config] = {
    "qwen3-30b-a3b": _sizes(2048, 6144, 768, 48, 32),
    "qwen3-235b-a22b": _sizes(4096, 12288, 1536, 94, 64),
    "qwen3-coder-480b-a35b": _sizes(
        6144, 8192, 2560, 62, 96, num_key_value_heads=8, num_experts=160, **_CODER
    ),
}

WEIGHTS = (*decoder_rules(), *expert_rules())
