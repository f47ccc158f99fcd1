"""Stacks of several segments and units, run in every way, against the blocks called one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ropewalk.layers.stack import Stack, depth, pattern, repeats
from ropewalk.parallel.remat import Remat

D = 6


class Plain(nnx.Module):
    """x + tanh(x w) + offset; reports its mean, and counts calls in its cache."""

    def __init__(self, *, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (D, D)), axes=("embed", "mlp"))

    def __call__(self, x, ctx, cache=None):
        y = x + jnp.tanh(x @ self.weight[...]) + ctx
        return y, None if cache is None else cache + 1, {"mean": jnp.mean(y), "first": y[0, 0]}


class Gated(nnx.Module):
    """Another kind of block, which reports something else beside the mean."""

    def __init__(self, *, rngs):
        self.gate = nnx.Param(jax.random.normal(rngs.params(), (D,)), axes=("embed",))

    def __call__(self, x, ctx, cache=None):
        y = x * (1 + 0.1 * self.gate[...])
        return y, None if cache is None else cache + 10, {"mean": jnp.mean(y), "peak": jnp.max(y)}


def plain(rngs):
    return Plain(rngs=rngs)


def gated(rngs):
    return Gated(rngs=rngs)


# dense segment; unit of two repeated three times; a single unit of three.
PLAN = [([plain], 2), ([plain, gated], 3), ([gated, plain, plain], 1)]
KINDS = [Plain] * 2 + [Plain, Gated] * 3 + [Gated, Plain, Plain]
LAYERS = len(KINDS)


@functools.cache
def stack():
    return Stack(PLAN, rngs=nnx.Rngs(0))


def run(stack, x, ctx=0.5, caches=None):
    return jax.jit(lambda x: stack(x, jnp.float32(ctx), caches))(x)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, 3, D))


def set_run(way, remat: Remat = "none"):
    other = Stack(PLAN, rngs=nnx.Rngs(0))  # the same keys, so the same weights
    other.run, other.remat = way, remat
    return other


def one_by_one(x):
    """The independent way: every layer called in turn."""
    reports = []
    for i in range(LAYERS):
        x, _, report = stack().layer(i)(x, jnp.float32(0.5))
        reports.append(report)
    return x, reports


def test_layers_are_counted_through_segments_units_and_repeats():
    assert depth(stack()) == LAYERS
    assert [repeats(segment) for segment in stack().segments] == [2, 3, 1]
    assert [type(stack().layer(i)) for i in range(LAYERS)] == KINDS
    with pytest.raises(IndexError):
        stack().layer(LAYERS)


def test_every_layer_starts_with_its_own_weights():
    weights = [np.asarray(jax.tree.leaves(stack().layer(i))[0]) for i in range(LAYERS)]
    for i, mine in enumerate(weights):
        for other in weights[:i]:
            assert mine.shape != other.shape or not np.array_equal(mine, other)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("way", ["scan", "unroll"])
def test_every_way_equals_the_layers_one_by_one(x, way, remat):
    wanted, reports = one_by_one(x)
    y, caches, aux = run(set_run(way, remat), x)
    assert caches is None
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert set(aux) == {"mean", "first", "peak"}
    for name, values in aux.items():  # in layer order, those that report it
        mine = [report[name] for report in reports if name in report]
        np.testing.assert_allclose(values, jnp.stack(mine), rtol=1e-5, atol=1e-5)


def test_scan_has_the_gradients_of_unroll(x):
    def gradient(way):
        return jax.jit(jax.grad(lambda s, x: jnp.sum(jnp.sin(s(x, 0.5)[0])), argnums=(0, 1)))(
            set_run(way), x
        )

    for mine, theirs in zip(
        jax.tree.leaves(gradient("scan")), jax.tree.leaves(gradient("unroll")), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_each_layer_gets_its_own_cache_back_in_order(x):
    caches = [jnp.float32(100 * i) for i in range(LAYERS)]
    y, written, aux = run(stack(), x, caches=caches)
    added = [1 if kind is Plain else 10 for kind in KINDS]
    assert [float(c) for c in written] == [100 * i + more for i, more in enumerate(added)]
    without, _, reports = run(stack(), x)
    np.testing.assert_allclose(y, without, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aux["mean"], reports["mean"], rtol=1e-5, atol=1e-5)
    assert len(caches) == LAYERS, "the caller's list is left alone"


def test_unstacked_is_the_same_stack_with_a_segment_a_repeat(x):
    wanted, _, reports = run(stack(), x)
    single = Stack(PLAN, rngs=nnx.Rngs(0)).unstacked()
    assert [repeats(segment) for segment in single.segments] == [1] * 6
    assert depth(single) == LAYERS
    y, _, aux = run(single, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    for name, values in reports.items():
        np.testing.assert_allclose(aux[name], values, rtol=1e-5, atol=1e-5)
    for i in range(LAYERS):
        np.testing.assert_array_equal(
            jax.tree.leaves(single.layer(i))[0], jax.tree.leaves(stack().layer(i))[0]
        )


def test_blocks_that_report_nothing_give_no_reports(x):
    class Silent(nnx.Module):
        def __init__(self, *, rngs):
            self.scale = nnx.Param(jnp.ones(D), axes=("embed",))

        def __call__(self, x, ctx, cache=None):
            return x * self.scale[...], cache, {}

    y, _, aux = run(Stack([([lambda r: Silent(rngs=r)], 3)], rngs=nnx.Rngs(0)), x)
    assert aux == {}
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("kinds", ["a", "aaa", "abab", "aab" * 3 + "aa", "abc", "aaabb"])
def test_a_pattern_gives_every_layer_its_kind(kinds):
    plan = pattern(kinds, lambda kind, _: kind)
    laid = [make(None) for unit, repeats in plan for _ in range(repeats) for make in unit]
    assert "".join(laid) == kinds
    units = {"a": 1, "aaa": 1, "abab": 2, "aab" * 3 + "aa": 3, "abc": 1, "aaabb": 1}
    assert len(plan[0][0]) == units[kinds]
    assert sum(len(unit) for unit, _ in plan) <= len(set(kinds)) + 2
