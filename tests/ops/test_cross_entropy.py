"""The tiled loss and its hand-written gradients against plain logits and autodiff."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.ops.cross_entropy import cross_entropy, tile_count

B, T, D, V = 3, 12, 8, 40


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    head = rng.standard_normal((D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.choice([0.0, 0.25, 1.0], (B, T)).astype(np.float32)
    weights[0] = 0.0  # a whole row of padding
    return tuple(map(jnp.asarray, (x, head, targets, weights)))


def plain(x, head, targets, weights, z_loss=0.0, soft_cap=None):
    """The definition, with all logits at once."""
    logits = jnp.einsum("btd,dv->btv", x, head, preferred_element_type=jnp.float32)
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    right = jnp.argmax(logits, axis=-1) == targets
    return tuple(
        jnp.sum(weights * part) for part in (nats + z_loss * log_z**2, nats, jnp.ones(()), right)
    )


def with_gradient(function):
    def loss(x, head, *rest):
        sums = function(x, head, *rest)
        return sums[0], tuple(sums)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("tiles", [1, 3, 12, None])
def test_equals_plain_autodiff(tiles, z_loss, soft_cap):
    inputs = problem()
    options = {"z_loss": z_loss, "soft_cap": soft_cap}
    (_, sums), grads = with_gradient(functools.partial(cross_entropy, tiles=tiles, **options))(
        *inputs
    )
    (_, wanted), wanted_grads = with_gradient(functools.partial(plain, **options))(*inputs)
    np.testing.assert_allclose(sums, wanted, rtol=2e-6)
    for grad, want in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(grad, want, rtol=1e-5, atol=2e-6)
        assert grad.dtype == jnp.float32
    assert not np.any(grads[0][0]), "a token of weight 0 has a gradient"


def test_value_without_gradient_is_that_with_it():
    alone = jax.jit(lambda *args: cross_entropy(*args, z_loss=0.01, tiles=4))(*problem())
    (_, both), _ = with_gradient(lambda *a: cross_entropy(*a, z_loss=0.01, tiles=4))(*problem())
    np.testing.assert_allclose(alone, both, rtol=1e-6)


def test_the_gradient_follows_the_factor_on_the_loss():
    x, head, targets, weights = problem()

    def scaled(x, head):
        return 3.5 * cross_entropy(x, head, targets, weights, tiles=2).loss

    once = jax.grad(lambda *a: scaled(*a) / 3.5, argnums=(0, 1))(x, head)
    for grad, one in zip(jax.grad(scaled, argnums=(0, 1))(x, head), once, strict=True):
        np.testing.assert_allclose(grad, 3.5 * one, rtol=1e-5, atol=1e-6)


def test_only_the_loss_carries_a_gradient():
    x, head, targets, weights = problem()
    for name in ("nats", "correct", "weight"):
        grad = jax.grad(
            lambda x, name=name: getattr(cross_entropy(x, head, targets, weights), name)
        )
        assert not np.any(grad(x))


def test_bfloat16_is_near_float32():
    x, head, targets, weights = problem()
    narrow = (x.astype(jnp.bfloat16), head.astype(jnp.bfloat16))
    wide = tuple(a.astype(jnp.float32) for a in narrow)  # the same numbers, exact sums
    (_, sums), grads = with_gradient(lambda *a: cross_entropy(*a, tiles=3))(
        *narrow, targets, weights
    )
    (_, wanted), wanted_grads = with_gradient(plain)(*wide, targets, weights)
    np.testing.assert_allclose(sums, wanted, rtol=1e-5)  # logits are float32: only order differs
    for grad, want in zip(grads, wanted_grads, strict=True):
        assert grad.dtype == jnp.bfloat16
        # d_logits is rounded to 8 bits (0.4 %), and so is the result.
        np.testing.assert_allclose(
            grad.astype(np.float32), want, rtol=0.01, atol=0.01 * np.abs(want).max()
        )


def test_a_weightless_token_cannot_spoil_the_sums():
    x, head, targets, weights = problem()
    poisoned = x.at[0].set(jnp.inf)  # row 0 has no weight
    clean = cross_entropy(x, head, targets, weights, tiles=1)
    np.testing.assert_allclose(
        cross_entropy(poisoned, head, targets, weights, tiles=1), clean, rtol=1e-6
    )


def test_all_weights_zero_is_zero():
    x, head, targets, _ = problem()
    sums = cross_entropy(x, head, targets, jnp.zeros((B, T)))
    np.testing.assert_array_equal(sums, 0.0)


def test_large_logits_stay_finite():
    x, head, targets, weights = problem()
    (loss, _), grads = with_gradient(lambda *a: cross_entropy(*a, tiles=2))(
        x * 1e3, head, targets, weights
    )
    assert np.isfinite(loss) and all(np.all(np.isfinite(grad)) for grad in grads)


@pytest.mark.parametrize(
    ("batch", "length", "vocab"), [(1, 1, 10), (4, 512, 32000), (8, 2048, 128256), (3, 7, 10**6)]
)
def test_a_tile_divides_the_time_and_is_small(batch, length, vocab):
    tiles = tile_count(batch, length, vocab)
    assert length % tiles == 0
    assert 4 * batch * length * vocab / tiles <= 32 << 20 or tiles == length


def test_no_program_holds_all_logits():
    """The point of tiles: temporaries stay near one tile's logits, gradients included."""
    b, t, d, v, tiles = 4, 256, 16, 4096, 32
    shapes = [
        jax.ShapeDtypeStruct(*spec)
        for spec in (
            ((b, t, d), jnp.float32), ((d, v), jnp.float32), ((b, t), jnp.int32),
            ((b, t), jnp.float32),
        )
    ]  # fmt: skip
    program = with_gradient(lambda *a: cross_entropy(*a, tiles=tiles)).lower(*shapes)
    memory: Any = program.compile().memory_analysis()
    logits_bytes = 4 * b * t * v
    assert memory.temp_size_in_bytes < logits_bytes / 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_head_by_row_gives_the_same(dtype):
    x, head, targets, weights = problem()
    x, head = x.astype(dtype), head.astype(dtype)
    by_column = with_gradient(functools.partial(cross_entropy, z_loss=0.01, tiles=3))
    by_row = with_gradient(functools.partial(cross_entropy, z_loss=0.01, tiles=3, by_row=True))
    (_, sums), (d_x, d_head) = by_column(x, head, targets, weights)
    (_, turned), (d_x_turned, d_head_turned) = by_row(x, head.T, targets, weights)
    np.testing.assert_allclose(turned, sums, rtol=1e-6)
    near = 1e-6 if dtype == jnp.float32 else 0.01  # one rounding to bfloat16
    for found, want in ((d_x_turned, d_x), (d_head_turned.T, d_head)):
        np.testing.assert_allclose(
            found.astype(jnp.float32), want.astype(jnp.float32), rtol=near, atol=near
        )


@pytest.mark.parametrize("by_row", [False, True])
def test_a_float32_head_in_bfloat16_has_a_float32_gradient(by_row):
    """At a size that a CPU's library takes: there XLA must not fold the head's transposition."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 128, 128)), jnp.bfloat16)
    head = jnp.asarray(rng.standard_normal((128, 2048)) * 0.05, jnp.float32)
    targets = jnp.asarray(rng.integers(0, 2048, (2, 128)), jnp.int32)
    weights = jnp.ones((2, 128), jnp.float32)
    want = jax.grad(lambda head: plain(x, head, targets, weights)[0])(head)
    given = head.T if by_row else head
    found = jax.jit(
        jax.grad(lambda head: cross_entropy(x, head, targets, weights, by_row=by_row).loss)
    )(given)
    assert found.dtype == jnp.float32
    found = found.T if by_row else found
    assert float(jnp.linalg.norm(found - want) / jnp.linalg.norm(want)) < 0.01
