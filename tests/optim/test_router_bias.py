"""A router's bias follows the load, layer by layer, whatever the stack looks like."""

import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.core.errors import ConfigError
from ropewalk.core.paths import Spec
from ropewalk.optim import router_bias

E = 4


def spec(repeats, trained=False):
    return Spec((repeats, E), jnp.dtype("float32"), ("layers", "experts"), trained)


def other(repeats):
    return Spec((repeats, 8), jnp.dtype("float32"), ("layers", "embed"))


# A dense layer, then two units of (dense, experts, experts), then one with experts: layers 2, 3, 5,
# 6, 7 of the model.
TABLE = {
    "layers.segments.0.0.norm.scale": other(1),
    "layers.segments.1.0.norm.scale": other(2),
    "layers.segments.1.1.mlp.router.selection_bias": spec(2),
    "layers.segments.1.2.mlp.router.selection_bias": spec(2),
    "layers.segments.2.0.mlp.router.selection_bias": spec(1),
}
PATHS = [path for path, one in TABLE.items() if not one.trained]
LOAD = np.random.default_rng(0).permutation(5 * E).reshape(5, E).astype(np.float32)


def test_every_layers_bias_moves_against_its_own_load():
    frozen = {path: jnp.full(TABLE[path].shape, 0.5, jnp.float32) for path in PATHS}
    frozen["more"] = jnp.ones(3)
    moved = router_bias.build(0.25, TABLE)(frozen, {"router_load": jnp.asarray(LOAD)})
    step = 0.25 * np.sign(LOAD.mean(axis=1, keepdims=True) - LOAD)
    places = {PATHS[0]: [0, 2], PATHS[1]: [1, 3], PATHS[2]: [4]}
    for path, layers in places.items():
        np.testing.assert_array_equal(moved[path], 0.5 + step[layers])
    np.testing.assert_array_equal(moved["more"], frozen["more"])


def test_even_load_moves_nothing():
    frozen = {path: jnp.ones(TABLE[path].shape) for path in PATHS}
    moved = router_bias.build(0.25, TABLE)(frozen, {"router_load": jnp.full((5, E), 3.0)})
    for path in PATHS:
        np.testing.assert_array_equal(moved[path], frozen[path])


def test_without_a_rate_nothing_is_asked():
    frozen = {path: jnp.ones(TABLE[path].shape) for path in PATHS}
    assert router_bias.build(0.0, TABLE)(frozen, {}) is frozen
    assert router_bias.build(0.0, {})({}, {}) == {}


def test_a_rate_with_nothing_to_move_is_refused():
    dense = {path: one for path, one in TABLE.items() if one.trained}
    with pytest.raises(ConfigError, match=r"router_bias_rate = 0.001 .* no router"):
        router_bias.build(0.001, dense)
