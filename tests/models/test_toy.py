"""A new family is a new file: dropped into a folder of families, it trains without being
registered anywhere."""

import shutil
import sys

import jax
import numpy as np

from ropewalk import models
from ropewalk.losses.next_token import NextToken
from ropewalk.optim.optimizer import Optimizer
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import Placement
from ropewalk.parallel.rules import RULES
from ropewalk.train import state as states
from ropewalk.train.step import make_step
from tests.families.tiny import batch, tiny

TOY = '''
"""A family of its own: one product in place of attention and MLP."""

from ropewalk.core.weights import LINEAR, Rule
from ropewalk.layers.config import Grouped
from ropewalk.layers.linear import Linear
from ropewalk.layers.lm import LM
from flax import nnx


class Config(Grouped):
    architecture = "ToyForCausalLM"
    num_key_value_heads: int = 1
    head_dim: int = 2
    strength: float = 0.5


class Block(nnx.Module):
    def __init__(self, c, rngs):
        self.strength = c.strength
        self.mix = Linear((c.hidden_size,), (c.intermediate_size,), ("embed", "mlp"), rngs=rngs)
        self.back = Linear((c.intermediate_size,), (c.hidden_size,), ("mlp", "embed"), rngs=rngs)

    def __call__(self, x, ctx, cache=None):
        return x + self.strength * self.back(self.mix(x)), cache, {}


class Model(LM):
    def __init__(self, c, *, rngs):
        plan = [([lambda r: Block(c, r)], c.num_hidden_layers)]
        super().__init__(c, plan, rngs=rngs)


PRESETS = {"toy-1": Config.parse({
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2,
})}
WEIGHTS = (
    Rule("model.embed_tokens.weight", "embed.weight"),
    Rule("model.layers.{i}.mix.weight", "layers.*.mix.weight", LINEAR),
    Rule("model.layers.{i}.back.weight", "layers.*.back.weight", LINEAR),
    Rule("model.norm.weight", "final_norm.scale"),
    Rule("lm_head.weight", "head.weight", LINEAR),
)
'''


def test_a_file_is_a_family(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    try:
        assert "toy" in models.families() and "toy-1" in models.presets()
        assert models.from_recipe({"preset": "toy-1"}).config.strength == 0.5
        it = tiny("toy")
        placement = Placement(mesh.build({"fsdp": 1}, jax.devices()[:1]), RULES["fsdp"])
        optimizer = Optimizer()
        chain = optimizer.build(10, it.table)
        state, _ = states.build(
            lambda: states.fresh(dict(it.params), chain, np.float32), it.table, placement
        )
        rate = optimizer.schedule.build(1e-2, 10)
        step = make_step(
            it.structure, NextToken(), chain, placement, rate=rate, accumulate=1, seed=0
        )
        step = jax.jit(step)
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch())
            losses.append(float(metrics["loss"].sum / metrics["loss"].weight))
        assert losses[-1] < losses[0]
    finally:
        sys.modules.pop("ropewalk.models.toy", None)
        shutil.rmtree(tmp_path)
