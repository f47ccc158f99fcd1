"""Updates of a model with experts: losses of its routers over micro-batches, and the bias that no
gradient moves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ropewalk.core.errors import ConfigError
from ropewalk.losses.next_token import NextToken
from ropewalk.losses.output import LossOutput
from ropewalk.optim.optimizer import Optimizer
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import Placement
from ropewalk.parallel.rules import RULES
from ropewalk.train import state as states
from ropewalk.train.state import State
from ropewalk.train.step import make_step
from tests.families.tiny import batch, tiny

NAME = "deepseek_v3"
RATE = 0.01
PLACE = Placement(mesh.build({}, jax.devices()[:1]), RULES["fsdp"])
PLAIN = optax.sgd(1.0)
LOSS = NextToken(balance=0.3, balance_over="sequence", router_z=0.1)


def frozen() -> list[str]:
    return [path for path, spec in tiny(NAME).table.items() if not spec.trained]


def fresh() -> State:
    return states.fresh(tiny(NAME).params, PLAIN, "float32", frozen())


def step(parts: int = 1, loss: NextToken = LOSS) -> Any:
    it = tiny(NAME)
    post = Optimizer(router_bias_rate=RATE).post_update(it.table)
    made = make_step(
        it.structure,
        loss,
        PLAIN,
        PLACE,
        rate=optax.constant_schedule(1.0),
        accumulate=parts,
        seed=0,
        post_update=post,
    )
    return jax.jit(made)


def test_state_keeps_what_is_not_trained_apart() -> None:
    start = fresh()
    assert list(start.frozen) == frozen() and len(frozen()) > 0
    assert not set(start.params) & set(start.frozen)
    assert start.weights.keys() == tiny(NAME).params.keys()
    narrow = states.fresh(tiny(NAME).params, PLAIN, "bfloat16", frozen())
    assert {a.dtype.name for a in narrow.params.values()} == {"bfloat16"}
    assert {a.dtype.name for a in narrow.frozen.values()} == {"float32"}


@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_give_the_gradients_and_biases_of_the_batch(parts: int) -> None:
    start, rows = fresh(), batch()
    one, first = step()(start, rows)
    many, second = step(parts)(start, rows)
    for path, value in start.params.items():
        gradient = np.asarray(value - one.params[path])
        np.testing.assert_allclose(
            value - many.params[path], gradient, atol=3e-6 * max(1.0, np.abs(gradient).max())
        )
    for path in frozen():
        np.testing.assert_array_equal(one.frozen[path], many.frozen[path])
    assert first["router_max_load"] == second["router_max_load"] > 1
    for name in ("loss", "router_balance", "router_z"):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5)


def test_the_bias_moves_by_the_rate_against_the_load() -> None:
    start, rows = fresh(), batch()
    output: LossOutput = LOSS(tiny(NAME).model(), rows, jax.random.key(0))
    load = np.asarray(output.reports["router_load"])
    after, _ = step()(start, rows)
    moved = np.concatenate([np.asarray(after.frozen[p] - start.frozen[p]) for p in frozen()])
    wanted = RATE * np.sign(load.mean(axis=1, keepdims=True) - load)
    np.testing.assert_allclose(moved, wanted, atol=1e-6)
    tokens = int(np.sum(np.asarray(rows["segment_ids"]) > 0))
    assert load.sum(axis=1).tolist() == [2 * tokens] * len(load)  # top 2, no padding


def test_a_dropped_update_leaves_the_bias_bit_for_bit() -> None:
    start, rows = fresh(), batch()
    after, _ = step()(start, {**rows, "weights": rows["weights"].at[0, 0].set(jnp.nan)})
    for path in frozen():
        np.testing.assert_array_equal(after.frozen[path], start.frozen[path])


def test_losses_of_routers_are_in_the_objective_by_their_weights() -> None:
    plain = NextToken()(tiny(NAME).model(), batch(), jax.random.key(0))
    whole = LOSS(tiny(NAME).model(), batch(), jax.random.key(0))
    layers = whole.reports["router_load"].shape[0]
    parts = whole.metrics["router_balance"].sum, whole.metrics["router_z"].sum
    wanted = plain.objective.sum + layers * (LOSS.balance * parts[0] + LOSS.router_z * parts[1])
    np.testing.assert_allclose(whole.objective.sum, wanted, rtol=1e-5)
    np.testing.assert_array_equal(whole.metrics["loss"], plain.metrics["loss"])


@pytest.mark.parametrize("values", [{"balance": 0.1}, {"router_z": 0.1}])
def test_a_model_without_a_router_refuses_what_is_asked_of_one(values: dict[str, float]) -> None:
    loss = NextToken.model_validate(values)
    with pytest.raises(ConfigError, match=rf"objective.{next(iter(values))} = 0.1 .* no router"):
        loss(tiny("llama").model(), batch(), jax.random.key(0))


def test_a_state_with_biases_survives_its_tree() -> None:
    start = fresh()
    emptied = dataclasses.replace(start, frozen=jax.tree.map(jnp.zeros_like, start.frozen))
    again = emptied.filled(start.tree())
    for path in frozen():
        np.testing.assert_array_equal(again.frozen[path], start.frozen[path])
