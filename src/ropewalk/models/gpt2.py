"""GPT-2: layer norms with biases, learned positions, an MLP without gate, a tied head. OpenAI,
"Language Models are Unsupervised Multitask Learners" (2019).

Quirks: the products lie [in, out] in files, query, key and value in one; older files leave the
prefix `transformer.` out and carry masks.
"""

from typing import ClassVar

from flax import nnx

from ropewalk.layers.block import Block, attention
from ropewalk.layers.config import Positioned
from ropewalk.layers.linear import depth_std
from ropewalk.layers.lm import LM
from ropewalk.layers.mlp import MLP
from ropewalk.layers.names import gpt_rules
from ropewalk.layers.stack import pattern


class Config(Positioned):
    """Sizes under the names of the other families; `config.json` has GPT-2's."""

    architecture: ClassVar[str] = "GPT2LMHeadModel"
    spelt: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
    }
    harmless: ClassVar[frozenset[str]] = frozenset({
        "attn_pdrop", "embd_pdrop", "n_ctx", "reorder_and_upcast_attn", "resid_pdrop",
        "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
        "summary_use_proj", "task_specific_params",
    })  # fmt: skip

    hidden_act: str = "gelu_new"
    scale_attn_weights: bool = True
    """whether scores are divided by the root of the head's size"""
    scale_attn_by_inverse_layer_idx: bool = False
    """whether those of layer i are divided by i + 1 too"""

    def scales(self) -> tuple[float, ...]:
        """Of every layer's scores."""
        one = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        by_layer = self.scale_attn_by_inverse_layer_idx
        return tuple(one / (i + 1 if by_layer else 1) for i in range(self.num_hidden_layers))


def block(c: Config, scale: float, rngs: nnx.Rngs) -> Block:
    """One layer whose scores have this scale."""
    mixer = attention(c, rngs, bias=True, out_bias=True, rope=None, scale=scale)
    std = depth_std(c.num_hidden_layers)
    inner = c.intermediate_size
    mlp = MLP(c.hidden_size, inner, activation=c.hidden_act, out_std=std, rngs=rngs)
    return Block(c, mixer, mlp)


class Model(LM):
    """A stack of one segment, or of one unit where every layer has its own scale."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        super().__init__(c, pattern(c.scales(), lambda scale, r: block(c, scale, r)), rngs=rngs)


def _sizes(hidden: int, layers: int, heads: int) -> Config:
    return Config.parse({
        "vocab_size": 50257,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 1024,
    })  # fmt: skip


PRESETS: dict[str, Config] = {
    "gpt2": _sizes(768, 12, 12),
    "gpt2-medium": _sizes(1024, 24, 16),
    "gpt2-large": _sizes(1280, 36, 20),
    "gpt2-xl": _sizes(1600, 48, 25),
}

WEIGHTS = gpt_rules()
