"""A layer of experts, with what its family adds, against the words of its parts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ropewalk.layers import moe
from ropewalk.layers.attention import Context
from ropewalk.layers.lm import table
from ropewalk.layers.mlp import GatedMLP
from ropewalk.layers.router import Routing

B, T, D, F, E = 2, 5, 8, 6, 4
SEGMENTS = jnp.asarray([[1] * T, [1] * (T - 2) + [0] * 2], jnp.int32)
CONTEXT = Context(jnp.zeros((B, T), jnp.int32), SEGMENTS, {})


def layer(**more) -> Any:
    rngs = nnx.Rngs(0)
    many = moe.Experts(E, D, F, bias=True, active_share=0.5, out_std=0.3, rngs=rngs)
    return moe.MoE(D, many, Routing(E, 2), moe.gated("silu"), rngs=rngs, **more)


def test_a_shared_expert_adds_to_every_token_behind_its_gate():
    rngs = nnx.Rngs(1)
    x = jax.random.normal(jax.random.key(2), (B, T, D))
    shared = GatedMLP(D, 7, activation="silu", out_std=0.3, rngs=rngs)
    gated = layer(shared=shared, shared_gate=True)
    bare, report = layer()(x, CONTEXT)
    y, same = gated(x, CONTEXT)
    door: Any = gated.shared_gate
    gate = jax.nn.sigmoid(x @ door.weight[...])
    np.testing.assert_allclose(y, bare + gate[..., None] * shared(x)[0], rtol=1e-5, atol=1e-6)
    assert same.keys() == report.keys()
    np.testing.assert_array_equal(report["router_load"].sum(axis=1), [2 * T, 2 * (T - 2)])
    assert not np.any(np.asarray(bare)[1, -2:])  # padding is sent to nobody


def test_the_clipped_gate_is_that_of_its_paper():
    gate, up = np.linspace(-12, 12, 49), np.linspace(12, -12, 49)
    found = moe.clipped(1.702, 7.0)(jnp.asarray(gate), jnp.asarray(up))
    cut = np.minimum(gate, 7)
    wanted = (np.clip(up, -7, 7) + 1) * cut / (1 + np.exp(-1.702 * cut))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_an_expert_starts_as_a_matrix_of_its_own():
    specs = table(layer())
    assert specs["experts.down"].axes == ("experts", "mlp", "embed")
    assert specs["experts.down_bias"].axes == ("experts", "embed")
    gate = np.asarray(layer().experts.gate[...])
    assert len({matrix.tobytes() for matrix in gate}) == E
