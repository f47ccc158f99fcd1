"""The convolution against loops over the stored tokens of each document."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.ops import convolution

B, T, N, H = 2, 30, 2, 3


def inputs(width, stored=0.7, documents=0.15):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((B, T, N, H)).astype(np.float32)
    weight = rng.standard_normal((N, H, width)).astype(np.float32)
    carried = rng.standard_normal((B, width - 1, N, H)).astype(np.float32)
    numbers = np.cumsum(rng.random((B, T)) < documents, axis=1).astype(np.int32)
    return x, weight, carried, numbers, rng.random((B, T)) < stored


def definition(x, weight, carried, documents, stored):
    """y, zero where nothing is stored, and what a next call is to carry."""
    width = weight.shape[-1]
    y, after = np.zeros_like(x), np.zeros_like(carried)
    for row in range(B):
        known, document = list(carried[row]), documents[row, 0]
        for t in range(T):
            if documents[row, t] != document:
                known, document = [], documents[row, t]
            if stored[row, t]:
                known.append(x[row, t])
                last = known[-width:]
                y[row, t] = sum(weight[..., width - len(last) + i] * z for i, z in enumerate(last))
        last = known[-(width - 1) :] if width > 1 else []
        for i, z in enumerate(last):
            after[row, width - 1 - len(last) + i] = z
    return y, after


def run(x, weight, carried, documents, stored):
    places, last = convolution.earlier(documents, stored, weight.shape[-1])
    y = convolution.causal(x, weight, carried, places)
    after = convolution.taken(jnp.concatenate([carried, x], axis=1), last)
    return jnp.where(stored[..., None, None], y, 0), after


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("stored", [0.05, 0.7, 1.0])
def test_equals_the_definition(width, stored):
    given = inputs(width, stored)
    for mine, theirs in zip(jax.jit(run)(*given), definition(*given), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_a_product_with_every_place():
    x, weight, carried, documents, stored = inputs(4)
    places, _ = convolution.earlier(jnp.asarray(documents), jnp.asarray(stored), 4)
    out = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)

    def dense(x, weight, carried, places):
        tokens = jnp.concatenate([carried, x], axis=1)
        own = jnp.broadcast_to(jnp.arange(3, T + 3)[:, None], (B, T, 1))
        every = jnp.concatenate([places[..., ::-1], own], axis=-1)
        chosen = jax.nn.one_hot(every, T + 3)  # of -1, nothing
        return jnp.einsum("btws,bsnh,nhw->btnh", chosen, tokens, weight)

    def outcome(form):
        def loss(*parts):
            y = form(*parts, places)
            return jnp.sum(out * jnp.sin(y)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, weight, carried)

    mine, theirs = outcome(convolution.causal), outcome(dense)
    for found, wanted in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
