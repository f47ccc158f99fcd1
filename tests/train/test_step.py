"""One update, against the same thing written out plainly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ropewalk.layers.lm import parameters, table, with_parameters
from ropewalk.losses.next_token import NextToken
from ropewalk.models import llama
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import Placement
from ropewalk.parallel.rules import RULES
from ropewalk.train import state as states
from ropewalk.train.state import State
from ropewalk.train.step import make_step

CONFIG = llama.Config.parse(
    {
        "vocab_size": 62,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
)
PLACE = Placement(mesh.build({}, jax.devices()[:1]), RULES["fsdp"])
OPTIMIZER = optax.adamw(1e-2)


def model(compute: str = "float32") -> llama.Model:
    made = llama.Model(CONFIG, rngs=nnx.Rngs(0))
    made.embed.dtype = compute
    return made


def step(accumulate: int = 1, optimizer: Any = OPTIMIZER, compute: str = "float32") -> Any:
    return jax.jit(
        make_step(
            jax.eval_shape(lambda: model(compute)),
            NextToken(z_loss=1e-3),
            optimizer,
            PLACE,
            rate=optax.constant_schedule(1e-2),
            accumulate=accumulate,
            seed=0,
        )
    )


def batch(rows: int = 8, length: int = 12, seed: int = 0) -> dict[str, jax.Array]:
    """Random tokens whose weights differ wildly from row to row."""
    source = np.random.default_rng(seed)
    tokens = source.integers(0, CONFIG.vocab_size, (rows, length + 1))
    kept = source.integers(1, length, rows)
    weights = (np.arange(length) < kept[:, None]) * source.uniform(0.5, 2.0, (rows, length))
    weights[2] = 0.0
    return {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)),
        "segment_ids": jnp.ones((rows, length), jnp.int32),
        "weights": jnp.asarray(weights, jnp.float32),
    }


def fresh(optimizer: optax.GradientTransformation = OPTIMIZER) -> State:
    return states.fresh(parameters(model()), optimizer, "float32")


def plain_loss(params: dict[str, jax.Array], batch: dict[str, jax.Array], z_loss: float) -> Any:
    """Mean weighted cross-entropy from whole logits, in the way of a textbook."""
    logits, _, _ = with_parameters(jax.eval_shape(model), params)(
        batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    normaliser = jax.scipy.special.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    each = normaliser - picked + z_loss * normaliser**2
    return jnp.sum(each * batch["weights"]) / jnp.sum(batch["weights"])


def test_update_is_the_plain_one() -> None:
    start, rows = fresh(), batch()
    grads = jax.jit(jax.grad(plain_loss))(start.params, rows, 1e-3)
    updates, _ = OPTIMIZER.update(grads, start.opt_state, start.params)
    after, metrics = step()(start, rows)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    expected: Any = optax.apply_updates(start.params, updates)
    for path, value in after.params.items():
        # Adam's first update is the sign of a gradient, whatever its size: rounding may turn one
        # that is zero.
        sure = np.abs(grads[path]) > 1e-7
        np.testing.assert_allclose(np.asarray(value)[sure], expected[path][sure], atol=2e-6)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradient_is_that_of_the_batch(parts: int) -> None:
    plain = optax.sgd(1.0)
    start, rows = fresh(plain), batch()
    one, first = step(1, optimizer=plain)(start, rows)
    many, second = step(parts, optimizer=plain)(start, rows)
    for path, value in start.params.items():
        gradient = np.asarray(value - one.params[path])
        np.testing.assert_allclose(
            value - many.params[path], gradient, atol=1e-6 * max(1.0, np.abs(gradient).max())
        )
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-6)


def test_bfloat16_micro_batches_add_up_in_float32() -> None:
    """256 equal micro-batches: a bfloat16 sum would stop growing at 256 times the first."""
    plain = optax.sgd(1.0)
    start, row = fresh(plain), {name: a[:1] for name, a in batch().items()}
    moved = []
    for parts in (1, 256):
        rows = {name: jnp.tile(a, (parts, 1)) for name, a in row.items()}
        after, _ = step(parts, optimizer=plain, compute="bfloat16")(start, rows)
        moved.append({path: start.params[path] - after.params[path] for path in start.params})
    for path, gradient in moved[0].items():
        np.testing.assert_allclose(gradient, moved[1][path], rtol=1e-4, atol=1e-6)


def _poisoned(kind: str, rows: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
    start = fresh()
    if kind == "loss":
        return start, {**rows, "weights": rows["weights"].at[0, 0].set(jnp.nan)}
    params = {
        path: value * (1e38 if ".up." in path or ".gate." in path else 1)
        for path, value in start.params.items()
    }
    return State(params, {}, start.opt_state, start.step, start.extra), rows


@pytest.mark.parametrize("kind", ["loss", "weights"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_update_that_is_not_finite_is_dropped(kind: str, accumulate: int) -> None:
    start, rows = _poisoned(kind, batch())
    run = step(accumulate)
    after, metrics = run(start, rows)
    assert _bits(after.params) == _bits(start.params)
    assert _bits(after.opt_state) == _bits(start.opt_state)
    assert (int(after.step), int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 1, 1)
    after, metrics = run(after, rows)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 2)
    healthy = State(fresh().params, {}, after.opt_state, after.step, after.extra)
    after, metrics = run(healthy, batch())
    assert (int(after.step), int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (3, 2, 0)
    assert _bits(after.params) != _bits(healthy.params)


def test_batch_of_padding_changes_nothing() -> None:
    start, rows = fresh(), batch()
    after, metrics = step()(start, {**rows, "weights": jnp.zeros_like(rows["weights"])})
    assert _bits(after.params) == _bits(start.params)
    assert _bits(after.opt_state) == _bits(start.opt_state)
    assert int(metrics["skipped"]) == 0


def test_state_lies_as_its_parameters() -> None:
    place = Placement(mesh.build({"fsdp": 4, "tensor": 2}), RULES["fsdp_tensor"])
    specs = table(jax.eval_shape(model))
    where = states.place(jax.eval_shape(fresh), specs, place)
    adam = where.opt_state[0]
    for path in specs:
        assert where.params[path] == adam.mu[path] == adam.nu[path]
    assert adam.count.is_fully_replicated
    assert any(not sharding.is_fully_replicated for sharding in where.params.values())


def test_state_survives_its_tree() -> None:
    start = fresh()
    again = start.filled(start.tree())
    assert jax.tree.structure(again) == jax.tree.structure(start)
    assert _bits(again) == _bits(start)
    assert parameters(model()).keys() == start.params.keys()


def _bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
