"""All ways to bring tokens to experts and back agree, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.layers import dispatch, moe
from ropewalk.layers.router import Choice
from ropewalk.ops.experts import Weights
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import Placement, placed
from ropewalk.parallel.rules import RULES

B, T, D, F, E, K = 8, 12, 16, 24, 4, 2
ACTS = {"gated": moe.gated("silu"), "clipped": moe.clipped(1.702, 0.5)}
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def given():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)

    scores = rng.standard_normal((B, T, E)) + np.array([2.0, 0, 0, -1])  # not even
    expert = np.argsort(-scores, axis=-1)[..., :K]
    expert[:, -2:] = E  # padding
    expert[0, :3] = E
    matrices = normal(E, D, F), normal(E, D, F), normal(E, F, D)
    biases = normal(E, F), normal(E, F), normal(E, D)
    choice = Choice(jnp.asarray(expert, jnp.int32), jnp.asarray(rng.random((B, T, K)), jnp.float32))
    return normal(B, T, D), choice, Weights(*matrices, *biases)


def by_hand(x, choice, weights, act, on_input):
    """Token by token, expert by expert, in float64."""
    y = np.zeros(x.shape)
    gate, up, down, *biases = (np.asarray(w, np.float64) for w in weights)
    for place in np.ndindex(*choice.expert.shape):
        e, share = int(choice.expert[place]), float(choice.weight[place])
        if e == E:
            continue
        row = np.asarray(x[place[:2]], np.float64) * (share if on_input else 1)
        plus = [bias[e] for bias in biases]
        inner = act(jnp.asarray(row @ gate[e] + plus[0]), jnp.asarray(row @ up[e] + plus[1]))
        y[place[:2]] += (np.asarray(inner) @ down[e] + plus[2]) * (1 if on_input else share)
    return y


def run(way, act, on_input, place=None):
    """What comes out, and the gradients of a mixture of it."""
    x, choice, weights = given()

    def mixture(x, weight, weights):
        with placed(place):
            y = way(x, choice._replace(weight=weight), weights, act, on_input)
        return jnp.sum(jnp.sin(y) * jnp.arange(D)), y

    gradients = jax.value_and_grad(mixture, argnums=(0, 1, 2), has_aux=True)
    (_, y), found = jax.jit(gradients)(x, choice.weight, weights)
    return y, found


@functools.cache
def reference(act, on_input):
    return run(dispatch.dense, ACTS[act], on_input)


cases = pytest.mark.parametrize("on_input", [False, True])


@cases
@pytest.mark.parametrize("act", ACTS)
def test_the_reference_is_what_the_words_say(act, on_input):
    close(reference(act, on_input)[0], by_hand(*given(), ACTS[act], on_input))


@cases
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("way", [dispatch.dropless, dispatch.capacity(float(E))])
def test_what_drops_nothing_equals_the_reference(way, act, on_input):
    same(run(way, ACTS[act], on_input), reference(act, on_input))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["dense", "dropless", "capacity"])
def test_eight_devices_give_what_one_gives(name, rules):
    way, on_input = dispatch.choose(name, 0.75), rules == "fsdp"
    sizes = {"fsdp_expert": {"fsdp": 2, "expert": 2, "data": 2}, "tensor": {"tensor": 8}}
    place = Placement(mesh.build(sizes.get(rules) or mesh.default_sizes(rules, 8)), RULES[rules])
    same(run(way, ACTS["clipped"], on_input, place), run(way, ACTS["clipped"], on_input))


def test_experts_apart_serve_tokens_that_are_not():
    """One row does not divide over the devices: each of them works on all of it."""
    place = Placement(mesh.build({"expert": 4, "data": 2}), RULES["fsdp_expert"])
    x, choice, weights = given()
    x, choice = jax.tree.map(lambda a: a[:1], (x, choice))

    def apply(place):
        with placed(place):
            return dispatch.dropless(x, choice, weights, ACTS["gated"], False)

    close(jax.jit(lambda: apply(place))(), jax.jit(lambda: apply(None))())


def same(found, wanted):
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(theirs))))
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-5 * scale)


def test_an_expert_has_places_for_its_share_and_drops_what_comes_later():
    x, choice, weights = given()
    places = 3
    kept = np.array(choice.expert)
    for row in range(B):
        taken = np.zeros(E + 1, int)
        for t, k in np.ndindex(T, K):
            e = kept[row, t, k]
            if e < E and taken[e] == places:
                kept[row, t, k] = E
            elif e < E:
                taken[e] += 1
    assert np.any(kept != choice.expert)
    factor = places * E / (T * K)
    found = dispatch.capacity(factor)(x, choice, weights, ACTS["gated"], False)
    fewer = choice._replace(expert=jnp.asarray(kept))
    close(found, dispatch.dense(x, fewer, weights, ACTS["gated"], False))


def test_padding_gets_nothing_and_takes_no_place():
    x, choice, weights = given()
    noise = jnp.where((choice.expert == E).all(-1)[..., None], 1e3, x)
    for name in ("dense", "dropless", "capacity"):
        way = dispatch.choose(name, 0.75)
        y = way(x, choice, weights, ACTS["gated"], False)
        assert not np.any(np.asarray(y)[np.asarray(choice.expert == E).all(-1)])
        np.testing.assert_array_equal(way(noise, choice, weights, ACTS["gated"], False), y)
