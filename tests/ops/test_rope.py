"""Rotary positions as complex numbers: pair (i, i + h/2) is turned by e^(i angle)."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.ops import rope

H = 16


def rotated(x, positions, frequencies, scale=1.0):
    """The independent way: complex multiplication in float64."""
    pairs = x[..., : H // 2] + 1j * x[..., H // 2 :]
    turn = scale * np.exp(1j * positions[..., None] * frequencies)[:, :, None]
    return np.concatenate([(pairs * turn).real, (pairs * turn).imag], axis=-1)


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_equals_complex_multiplication(scale):
    x = random((2, 5, 3, H))
    positions = np.array([[0, 1, 2, 3, 4], [0, 7, 0, 100, 4000]])
    frequencies = rope.frequencies(H, 10_000.0)
    cos, sin = rope.angles(jnp.asarray(positions, jnp.int32), frequencies, scale)
    mine = rope.rotate(jnp.asarray(x), cos, sin)
    # The angle is a float32: at position 4000 it is off by up to 4000 * 2^-24 = 2.4e-4 radians.
    np.testing.assert_allclose(mine, rotated(x, positions, frequencies, scale), atol=1e-3)
    np.testing.assert_allclose(
        mine[0], rotated(x, positions, frequencies, scale)[0], rtol=1e-6, atol=2e-6
    )


def test_frequencies_are_a_geometric_row_from_one():
    found = rope.frequencies(H, 500.0)
    assert found[0] == 1.0
    np.testing.assert_allclose(found[1:] / found[:-1], 500.0 ** (-2 / H), rtol=1e-12)


def test_products_depend_on_the_distance_only():
    q, k = random((1, 1, 1, H), 1), random((1, 1, 1, H), 2)
    frequencies = rope.frequencies(H, 100.0)

    def product(first, second):
        turned = [
            rope.rotate(jnp.asarray(x), *rope.angles(jnp.full((1, 1), p, jnp.int32), frequencies))
            for x, p in ((q, first), (k, second))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


def test_dtype_is_kept_and_computed_in_float32():
    x = jnp.asarray(random((1, 3, 2, H)), jnp.bfloat16)
    cos, sin = rope.angles(jnp.arange(3)[None], rope.frequencies(H, 1e4))
    turned = rope.rotate(x, cos, sin)
    assert turned.dtype == jnp.bfloat16 and cos.dtype == jnp.float32
    exact = rope.rotate(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


def test_llama3_keeps_short_waves_and_divides_long_ones():
    base = rope.frequencies(128, 5e5)
    found = rope.llama3_frequencies(base, 8.0, 1.0, 4.0, 8192)
    wave = 2 * math.pi / base
    for mine, theirs, length in zip(found, base, wave, strict=True):  # the paper's three cases
        if length < 8192 / 4.0:
            assert mine == pytest.approx(theirs, rel=1e-12)
        elif length > 8192 / 1.0:
            assert mine == pytest.approx(theirs / 8.0, rel=1e-12)
        else:
            smooth = (8192 / length - 1.0) / (4.0 - 1.0)
            assert mine == pytest.approx((1 - smooth) * theirs / 8 + smooth * theirs, rel=1e-12)
    assert found[0] == base[0] and found[-1] < base[-1]


def test_yarn_goes_from_extrapolation_to_interpolation():
    base = rope.frequencies(64, 1e4)
    found = rope.yarn_frequencies(base, 1e4, 4.0, 32.0, 1.0, 2048, True)
    ratio = found / base
    turns = 2048 * base / (2 * math.pi)  # over the original length
    assert np.all(ratio[turns > 40] == 1.0)  # beta_fast = 32, and one pair of rounding
    np.testing.assert_allclose(ratio[turns < 0.7], 0.25, rtol=1e-12)
    assert np.all(np.diff(ratio) <= 0)


def test_yarn_of_factor_one_changes_nothing():
    base = rope.frequencies(64, 1e4)
    found = rope.yarn_frequencies(base, 1e4, 1.0, 32.0, 1.0, 2048, False)
    np.testing.assert_allclose(found, base, rtol=1e-12)


def test_interleaved_pairs_are_complex_numbers_times_a_rotation():
    x = np.random.default_rng(3).standard_normal((2, 5, 3, H)).astype(np.float32)
    frequencies, positions = rope.frequencies(H, 1e4), np.arange(5)
    cos, sin = rope.angles(jnp.arange(5)[None], jnp.asarray(frequencies, jnp.float32))
    wanted = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(
        1j * positions[:, None, None] * frequencies
    )
    mine = np.asarray(rope.rotate(jnp.asarray(x), cos, sin, interleaved=True))
    np.testing.assert_allclose(mine[..., 0::2] + 1j * mine[..., 1::2], wanted, atol=1e-5)


def test_features_beyond_the_angles_are_left_alone():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, 4, 2, H + 6)), jnp.float32)
    angles = rope.angles(jnp.arange(4)[None], jnp.asarray(rope.frequencies(H, 1e4), jnp.float32))
    mine = rope.rotate(x, *angles)
    np.testing.assert_array_equal(mine[..., H:], x[..., H:])
    np.testing.assert_array_equal(mine[..., :H], rope.rotate(x[..., :H], *angles))
