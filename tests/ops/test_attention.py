"""Every implementation against the definition written as loops, and against jax's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.core.errors import LayoutError
from ropewalk.ops import attention, mask

B, T, S, H = 2, 7, 9, 8


def inputs(n, k, dtype: Any = np.float32):
    rng = np.random.default_rng(n)
    q, key, value = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((B, T, n, H), (B, S, k, H), (B, S, k, H))
    )
    seen = rng.random((B, T, S)) < 0.5
    seen[:, :, 0] = True  # every query sees something
    return q, key, value, jnp.asarray(seen)


OURS = [name for name in attention.IMPLEMENTATIONS if name != "library"]
named = pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)


@pytest.mark.parametrize(("n", "k"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("name", OURS)
def test_equals_the_library_with_its_gradients(name, n, k):
    given = inputs(n, k)

    def outcome(attend):
        def loss(*qkv):
            y = attend(*qkv, given[3], 0.3)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*given[:3])

    mine, theirs = (outcome(attention.IMPLEMENTATIONS[one]) for one in (name, "library"))
    for found, wanted in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("cap", [None, 0.7])
@named
def test_equals_the_definition(name, cap):
    q, k, v, seen = (np.asarray(a) for a in inputs(6, 2))
    wanted = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, 6):
        places = np.flatnonzero(seen[b, t])
        scores = np.array([0.3 * q[b, t, n] @ k[b, s, n // 3] for s in places])
        scores = np.exp(cap * np.tanh(scores / cap) if cap else scores)
        wanted[b, t, n] = (scores / scores.sum()) @ v[b, places, n // 3]
    mine = attention.IMPLEMENTATIONS[name](*inputs(6, 2), 0.3, cap)
    np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=2e-6)


@named
def test_what_is_not_seen_does_not_matter(name):
    q, k, v, seen = inputs(4, 2)
    hidden = ~jnp.any(seen[:, :2], axis=1)[:, :, None, None]  # keys that queries 0 and 1 never see
    attend = attention.IMPLEMENTATIONS[name]
    first = attend(q, k, v, seen, 0.3)[:, :2]
    other = attend(q, jnp.where(hidden, 7.0, k), jnp.where(hidden, -9.0, v), seen, 0.3)[:, :2]
    assert np.any(hidden)
    np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("name", OURS)
def test_a_query_that_sees_nothing_stays_finite_with_its_gradient(name):
    q, k, v, seen = inputs(4, 2)
    seen = seen.at[:, 3].set(False)

    def loss(q, k, v):
        return jnp.sum(attention.IMPLEMENTATIONS[name](q, k, v, seen, 0.3) ** 2)

    value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert np.isfinite(value) and all(np.all(np.isfinite(grad)) for grad in grads)


@pytest.mark.parametrize("name", OURS)
def test_bfloat16_has_a_float32_softmax(name):
    q, k, v, seen = inputs(4, 2, jnp.bfloat16)
    q32, k32, v32 = (a.astype(jnp.float32) for a in (q, k, v))
    wide = attention.reference(q32, k32, v32, seen, 0.3)
    narrow = attention.IMPLEMENTATIONS[name](q, k, v, seen, 0.3)
    assert narrow.dtype == jnp.bfloat16
    # Weights and result are rounded to 8 bits; scores and sums are not.
    np.testing.assert_allclose(narrow.astype(np.float32), wide, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", OURS)
def test_one_sequence_and_one_query_are_no_special_case(name):
    q, k, v, seen = inputs(6, 2)
    whole = attention.IMPLEMENTATIONS[name](q, k, v, seen, 0.3)
    one = attention.IMPLEMENTATIONS[name](q[:1], k[:1], v[:1], seen[:1], 0.3)
    last = attention.IMPLEMENTATIONS[name](q[:, -1:], k, v, seen[:, -1:], 0.3)
    np.testing.assert_allclose(one, whole[:1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last, whole[:, -1:], rtol=1e-5, atol=1e-6)


def test_auto_goes_by_platform_and_by_number_of_devices():
    wanted = {
        ("gpu", 1): "library", ("gpu", 8): "library", ("tpu", 8): "reference",
        ("cpu", 1): "sequential", ("cpu", 8): "reference",
    }  # fmt: skip
    assert {where: attention.choose("auto", *where)[0] for where in wanted} == wanted


@named
def test_a_name_is_taken_at_its_word(name):
    assert attention.choose(name, "cpu", 8) == (name, attention.IMPLEMENTATIONS[name])


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(LayoutError, match=r"layout.attention = flash: use auto, reference"):
        attention.choose("flash", "cpu", 1)


def test_mask_is_causal_by_position_within_a_segment():
    rng = np.random.default_rng(0)
    q_positions, k_positions = rng.integers(0, 6, (B, T)), rng.integers(-1, 6, (B, S))
    q_segments, k_segments = rng.integers(0, 3, (B, T)), rng.integers(0, 3, (B, S))
    segments = jnp.asarray(q_segments), jnp.asarray(k_segments)
    seen = mask.visible(jnp.asarray(q_positions), jnp.asarray(k_positions), *segments)
    unsegmented = mask.visible(jnp.asarray(q_positions), jnp.asarray(k_positions))
    for b, t, s in np.ndindex(B, T, S):
        ordered = 0 <= k_positions[b, s] <= q_positions[b, t]
        assert unsegmented[b, t, s] == ordered
        assert seen[b, t, s] == (ordered and q_segments[b, t] == k_segments[b, s])
