"""What each policy saves, by jax's own account, and that gradients stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.parallel.remat import wrap

W = jax.random.normal(jax.random.key(0), (16, 16))
X = jax.random.normal(jax.random.key(1), (3, 4, 16))


def block(x, w):
    y = jnp.tanh(jnp.einsum("btd,df->btf", x, w))  # a product with a parameter: no batch dims
    scores = jnp.einsum("btf,bsf->bts", y, y)  # and one between activations
    return jnp.einsum("bts,bsf->btf", jnp.tanh(scores), y)


def products(name):
    """How many products the gradient's program has; recomputed ones count again."""
    wrapped = wrap(block, name, in_scan=False)
    program = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(wrapped(X, w) ** 2)))(W)
    return str(program).count("dot_general")


@pytest.mark.parametrize("in_scan", [True, False])
@pytest.mark.parametrize("name", ["none", "full", "dots", "dots_no_batch"])
def test_no_policy_changes_the_gradient(name, in_scan):
    def gradient(function):
        return jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(function(X, w)))))(W)

    np.testing.assert_allclose(
        gradient(wrap(block, name, in_scan)), gradient(block), rtol=1e-5, atol=1e-5
    )


def test_policies_recompute_more_or_fewer_products():
    assert products("none") == products("dots")
    assert products("dots") < products("dots_no_batch") < products("full")


def test_none_is_the_function_itself():
    assert wrap(block, "none", in_scan=True) is block
