import jax
import jax.numpy as jnp
import numpy as np

from ropewalk.ops.norm import rms_norm


def test_equals_the_definition_in_float64():
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((2, 3, 8)), rng.standard_normal(8)
    wanted = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-3) * scale
    mine = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 1e-3)
    np.testing.assert_allclose(mine, wanted, rtol=2e-6)


def test_a_factor_on_the_input_does_not_matter_without_eps():
    x = jax.random.normal(jax.random.key(0), (4, 16))
    scale = jnp.ones(16)
    np.testing.assert_allclose(rms_norm(x, scale, 0.0), rms_norm(64.0 * x, scale, 0.0), rtol=1e-6)


def test_zeros_give_zeros_and_a_finite_gradient():
    zeros = jnp.zeros((2, 8))
    assert not np.any(rms_norm(zeros, jnp.ones(8), 1e-6))
    grad = jax.grad(lambda x: jnp.sum(rms_norm(x, jnp.ones(8), 1e-6)))(zeros)
    assert np.all(np.isfinite(grad))


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    x = jax.random.normal(jax.random.key(1), (4, 64), jnp.bfloat16)
    scale = 1 + jax.random.normal(jax.random.key(2), (64,), jnp.bfloat16)
    wide = rms_norm(x.astype(jnp.float32), scale.astype(jnp.float32), 1e-6)
    mine = rms_norm(x, scale, 1e-6)
    assert mine.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mine, wide.astype(jnp.bfloat16))
