"""AdamW and Muon against their papers' formulas in numpy; decay by kind; where the state lies."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ropewalk.core.errors import ConfigError
from ropewalk.core.paths import Spec
from ropewalk.layers.lm import parameters
from ropewalk.optim import muon
from ropewalk.optim.optimizer import Optimizer
from ropewalk.optim.schedule import Schedule
from ropewalk.train import state as states
from ropewalk.transforms.layout import Layout
from tests.families.tiny import tiny

RATE = 0.01
CONSTANT = Schedule(kind="constant")


def spec(shape, *axes):
    return Spec(shape, jnp.dtype("float32"), axes)


TABLE = {
    "embed.weight": spec((32, 16), "vocab", "embed"),
    "layers.query.weight": spec((2, 16, 4, 6), "layers", "embed", "heads", "head_dim"),
    "layers.out.weight": spec((2, 4, 6, 16), "layers", "heads", "head_dim", "embed"),
    "layers.up.weight": spec((2, 16, 24), "layers", "embed", "mlp"),
    "layers.experts.up": spec((2, 3, 16, 24), "layers", "experts", "embed", "mlp"),
    "layers.router.weight": spec((2, 16, 8), "layers", "embed", "experts"),
    "layers.latent_up.weight": spec((2, 12, 4, 6), "layers", "latent", "heads", "head_dim"),
    "layers.experts.down_bias": spec((2, 3, 16), "layers", "experts", "embed"),
    "layers.query.bias": spec((2, 4, 6), "layers", "heads", "head_dim"),
    "norm.scale": spec((16,), "embed"),
}
VECTORS = {"layers.query.bias", "norm.scale", "layers.experts.down_bias"}


def arrays(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(size * rng.standard_normal(one.shape), jnp.float32)
        for path, one in TABLE.items()
    }


def updates(params, grads, **values):
    """The updates of successive steps with these gradients."""
    chain = Optimizer(learning_rate=RATE, schedule=CONSTANT, **values).build(100, TABLE)
    state, found = chain.init(params), []
    update = jax.jit(chain.update)
    for grad in grads:
        change, state = update(grad, state, params)
        params = optax.apply_updates(params, change)
        found.append(change)
    return found


def test_adamw_is_its_paper():
    params, grads = arrays(0), [arrays(1), arrays(2), arrays(3)]
    found = updates(params, grads, clip=None, weight_decay=0.1, beta1=0.8, beta2=0.9)
    for path in TABLE:
        value, m, v = np.asarray(params[path], np.float64), 0.0, 0.0
        for t, (grad, change) in enumerate(zip(grads, found, strict=True), 1):
            g = np.asarray(grad[path], np.float64)
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
            wanted = -RATE * (step + (0 if path in VECTORS else 0.1) * value)
            np.testing.assert_allclose(change[path], wanted, rtol=2e-4, atol=1e-7, err_msg=path)
            value = value + wanted


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("decayed", [("matrix", "embedding"), ("matrix",), ("vector",), ()])
def test_weight_decay_goes_by_the_kind_of_parameter(kind, decayed):
    params = arrays(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (found,) = updates(params, [zeros], kind=kind, weight_decay=0.5, decayed=decayed)
    kinds = {path: "vector" if path in VECTORS else "matrix" for path in TABLE}
    kinds["embed.weight"] = "embedding"
    for path, change in found.items():  # without a gradient, decay is all that moves
        wanted = -RATE * 0.5 * params[path] if kinds[path] in decayed else 0 * params[path]
        np.testing.assert_allclose(change, wanted, rtol=1e-5, atol=1e-9, err_msg=path)


def test_clipping_bounds_the_norm_and_leaves_small_gradients_alone():
    params = arrays(0)
    values = {"weight_decay": 0.0, "epsilon": 1.0}  # a large epsilon: the update shows the size
    big, small = arrays(1, 100.0), arrays(1, 1e-4)
    norm = float(optax.tree.norm(big))
    (clipped,) = updates(params, [big], clip=0.5, **values)
    (scaled,) = updates(params, [jax.tree.map(lambda g: g * 0.5 / norm, big)], clip=None, **values)
    (kept,) = updates(params, [small], clip=0.5, **values)
    (bare,) = updates(params, [small], clip=None, **values)
    for path in TABLE:
        np.testing.assert_allclose(clipped[path], scaled[path], rtol=1e-4, atol=1e-9)
        np.testing.assert_array_equal(kept[path], bare[path])


@functools.cache
def muon_update():
    return updates(arrays(0), [arrays(1)], kind="muon", weight_decay=0.0, clip=None)[0]


def as_matrices(path, array):
    """A parameter as one matrix a layer or expert, in the shape that a product uses."""
    return np.asarray(array).reshape(MATRICES[path])


MATRICES = {
    "layers.query.weight": (2, 16, 24), "layers.out.weight": (2, 24, 16),
    "layers.up.weight": (2, 16, 24), "layers.experts.up": (6, 16, 24),
    "layers.router.weight": (2, 16, 8), "layers.latent_up.weight": (2, 12, 24),
}  # fmt: skip


@pytest.mark.parametrize("path", MATRICES)
def test_muons_update_of_a_matrix_is_nearly_orthogonal(path):
    for matrix, grad in zip(
        as_matrices(path, muon_update()[path]), as_matrices(path, arrays(1)[path]), strict=True
    ):
        singular = np.linalg.svd(matrix, compute_uv=False)
        # Newton-Schulz with Muon's coefficients brings them into 0.68 to 1.13, not to 1.
        assert singular.max() / singular.min() < 1.8
        assert np.linalg.cond(grad) > 3  # the gradient itself is far from it
        u, _, v = np.linalg.svd(-grad, full_matrices=False)
        cosine = np.sum(matrix * (u @ v)) / np.linalg.norm(matrix) / np.linalg.norm(u @ v)
        assert cosine > 0.975  # and it points to the nearest orthogonal matrix


@pytest.mark.parametrize("path", MATRICES)
def test_muons_update_has_the_size_of_adamws(path):
    size = float(jnp.sqrt(jnp.mean(muon_update()[path] ** 2)))
    # An orthogonal matrix times 0.2 sqrt(longer side); singular values of 0.68 to 1.13.
    assert size == pytest.approx(0.2 * RATE, rel=0.2)


@pytest.mark.parametrize("path", MATRICES)
def test_stacked_heads_are_updated_like_one_matrix_a_layer(path):
    grads, params = as_matrices(path, arrays(1)[path]), as_matrices(path, arrays(0)[path])
    axes = ("mlp", "embed") if path == "layers.out.weight" else ("embed", "mlp")
    for layer in range(len(grads)):
        table = {"w": spec(grads[layer].shape, *axes)}
        chain = Optimizer(
            kind="muon", learning_rate=RATE, schedule=CONSTANT, weight_decay=0.0, clip=None
        ).build(100, table)
        one = {"w": jnp.asarray(params[layer])}
        update: Any = chain.update
        change, _ = update({"w": jnp.asarray(grads[layer])}, chain.init(one), one)
        # The same sums in another order, through five iterations that amplify rounding.
        np.testing.assert_allclose(
            as_matrices(path, muon_update()[path])[layer], change["w"], rtol=1e-3, atol=1e-6
        )


def test_muon_leaves_all_that_is_no_matrix_to_adamw():
    params, grads = arrays(0), [arrays(1)]
    both = [
        updates(params, grads, kind=kind, weight_decay=0.1, clip=None)[0]
        for kind in ("adamw", "muon")
    ]
    for path in set(TABLE) - set(MATRICES):
        np.testing.assert_allclose(both[1][path], both[0][path], rtol=1e-5, atol=1e-9, err_msg=path)


def test_matrices_may_have_a_rate_of_their_own():
    (found,) = updates(
        arrays(0), [arrays(1)], kind="muon", weight_decay=0.0, clip=None,
        matrix_learning_rate=3 * RATE,
    )  # fmt: skip
    for path in TABLE:
        factor = 3 if path in MATRICES else 1
        np.testing.assert_allclose(found[path], factor * muon_update()[path], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", TABLE)
def test_the_sides_of_a_matrix_leave_out_layers_and_cover_the_rest(name):
    dims = muon.dimensions(TABLE[name])
    if name not in MATRICES:
        assert dims is None
        return
    assert dims is not None
    sides = (dims.reduction_axis, dims.output_axis)
    flat = [i for side in sides for i in ((side,) if isinstance(side, int) else side)]
    rest = 2 if ".experts." in name else 1
    assert sorted(flat) == list(range(rest, len(TABLE[name].shape)))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_not_trained_is_none_of_an_optimizers_business(kind):
    table = {**TABLE, "bias": dataclasses.replace(spec((3,), "experts"), trained=False)}
    with_it, without = (
        Optimizer(kind=kind).build(10, each).init(arrays(0)) for each in (table, TABLE)
    )
    assert jax.tree.structure(with_it) == jax.tree.structure(without)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_state_of_a_parameter_lies_where_the_parameter_does(kind):
    it = tiny("llama")
    placement = Layout(rules="fsdp_tensor").place()
    chain = Optimizer(kind=kind).build(10, it.table)
    abstract = jax.eval_shape(lambda: states.fresh(parameters(it.model()), chain, jnp.float32))
    where = states.place(abstract, it.table, placement)
    leaves = jax.tree_util.tree_leaves_with_path(where.opt_state)
    shapes = jax.tree.leaves(abstract.opt_state)
    found = dict.fromkeys(it.table, 0)
    for (path, sharding), leaf in zip(leaves, shapes, strict=True):
        owner = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else None
        if owner in it.table and leaf.shape == it.table[owner].shape:
            assert sharding == where.params[owner]
            found[owner] += 1
        else:
            assert sharding.is_fully_replicated and leaf.size <= 3  # a count, coefficients
    assert set(found.values()) <= {1, 2} and found["embed.weight"] == 2  # Adam's two moments
    matrices = [count for path, count in found.items() if path.endswith("up.weight")]
    assert matrices == [2 if kind == "adamw" else 1]


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0}, {"beta1": 1.0}, {"beta2": -0.1}, {"clip": 0}, {"weight_decay": -1},
        {"decayed": ["matrices"]}, {"kind": "adam"}, {"epsilon": 0},
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_key(values):
    with pytest.raises(ConfigError, match=f"optimizer: key `{next(iter(values))}"):
        Optimizer.parse(values, "optimizer")
