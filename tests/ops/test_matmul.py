"""`project` against einsum, and on a CPU with the dims flattened as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.ops.matmul import project, project_rows

CASES = [
    ("btd,df->btf", (2, 3, 8), (8, 5), 1),
    ("btd,dnh->btnh", (2, 3, 8), (8, 4, 6), 1),
    ("btnh,nhd->btd", (2, 3, 4, 6), (4, 6, 8), 2),
    ("d,dv->v", (8,), (8, 5), 1),
    ("btd,df->btf", (1, 1, 8), (8, 5), 1),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("letters", "x_shape", "w_shape", "contract"), CASES)
def test_equals_einsum_with_its_gradients(letters, x_shape, w_shape, contract, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(x_shape), dtype)
    weight = jnp.asarray(rng.standard_normal(w_shape), dtype)

    def mine(x, w):
        y = project(x, w, contract)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    def plain(x, w):
        y = jnp.einsum(letters, x, w, preferred_element_type=jnp.float32).astype(x.dtype)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    (_, y), grads = jax.value_and_grad(mine, argnums=(0, 1), has_aux=True)(x, weight)
    (_, wanted), wanted_grads = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(x, weight)
    assert y.dtype == dtype and y.shape == wanted.shape
    # bfloat16: one rounding of the float32 sum, which another order may tip to the neighbour.
    near = 1e-5 if dtype == jnp.float32 else 0.02
    for found, want in zip((y, *grads), (wanted, *wanted_grads), strict=True):
        assert found.dtype == dtype
        found, want = found.astype(np.float32), want.astype(np.float32)
        np.testing.assert_allclose(found, want, rtol=near, atol=near)


def test_the_weight_is_cast_to_the_activation():
    x, weight = jnp.ones((2, 4), jnp.bfloat16), jnp.full((4, 3), 1.001, jnp.float32)
    y = project(x, weight)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, 4.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("letters", "x_shape", "w_shape", "contract"), CASES)
def test_the_weight_the_other_way_round_gives_the_same(letters, x_shape, w_shape, contract, dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal(x_shape), dtype)
    weight = jnp.asarray(rng.standard_normal(w_shape), dtype)
    order = (*range(contract, weight.ndim), *range(contract))
    turned = project_rows(x, jnp.transpose(weight, order), contract)
    wanted = project(x, weight, contract)
    assert turned.shape == wanted.shape and turned.dtype == dtype
    near = 1e-5 if dtype == jnp.float32 else 0.02  # as above
    np.testing.assert_allclose(
        turned.astype(jnp.float32), wanted.astype(jnp.float32), rtol=near, atol=near
    )
