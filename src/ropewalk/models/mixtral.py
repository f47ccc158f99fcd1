"""Mixtral: Mistral's block with eight experts in place of the MLP, two of them a token.
arXiv:2401.04088"""

from typing import Any, ClassVar

import pydantic
from flax import nnx

from ropewalk.layers import moe
from ropewalk.layers.block import Block, attention
from ropewalk.layers.config import Count, Grouped
from ropewalk.layers.lm import LM
from ropewalk.layers.names import decoder_rules, expert_rules
from ropewalk.layers.router import Routing


class Config(Grouped):
    """Hugging Face's names."""

    architecture: ClassVar[str] = "MixtralForCausalLM"
    harmless: ClassVar[frozenset[str]] = frozenset({
        "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    })  # fmt: skip

    max_position_embeddings: Count = 131072
    rms_norm_eps: float = pydantic.Field(default=1e-5, gt=0)
    rope_theta: float = pydantic.Field(default=1e6, gt=0)
    sliding_window: Count | None = None
    """how many of the last keys a query sees; all where it is None"""
    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2

    @classmethod
    def _read(cls, values: dict[str, Any], source: str) -> dict[str, Any]:
        experts = values.pop("num_experts", None)
        if experts is not None:
            values.setdefault("num_local_experts", experts)
        return super()._read(values, source)

    def routing(self) -> Routing:
        """How experts are chosen."""
        return Routing(self.num_local_experts, self.num_experts_per_tok, renormalise=True)


def block(c: Config, rngs: nnx.Rngs) -> Block:
    """One layer."""
    mixer = attention(c, rngs, window=c.sliding_window)
    return Block(c, mixer, moe.experts(c, rngs, c.routing(), c.intermediate_size))


class Model(LM):
    """A stack of one segment."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, [([lambda r: block(c, r)], c.num_hidden_layers)], rngs=rngs)


def _sizes(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> Config:
    return Config.parse({
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        **more,
    })  # fmt: skip


PRESETS: dict[str, Config] = {
    "mixtral-8x7b": _sizes(4096, 14336, 32, 32, vocab_size=32000, max_position_embeddings=32768),
    "mixtral-8x22b": _sizes(6144, 16384, 56, 48, vocab_size=32768, max_position_embeddings=65536),
}

_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}
WEIGHTS = (
    *decoder_rules(),
    *expert_rules("block_sparse_moe.gate", "block_sparse_moe.experts", **_EXPERT),
)
