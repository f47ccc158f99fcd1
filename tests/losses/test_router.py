"""Balance and z-loss from their definitions, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.losses import router

L, B, T, E, K = 2, 3, 7, 4, 2
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((L, B, T, E)) * 2
REAL = np.arange(T) < np.array([7, 4, 1])[:, None]
ROWS = jnp.asarray([2.0, 0.5, 1.0])
SCORES = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
CHOSEN = np.zeros_like(SCORES)
np.put_along_axis(CHOSEN, np.argsort(-SCORES, -1)[..., :K], 1.0, -1)
NORMALISERS = np.log(np.exp(LOGITS).sum(-1))


def aux():
    keep = REAL[None, :, :, None]
    values = {
        "router_load": (CHOSEN * keep).sum(2),
        "router_probability": (SCORES * keep).sum(2),
        "router_z": (NORMALISERS**2 * REAL).sum(2),
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def one(layer, keep):
    """DeepSeek-V3's equations 17 to 20 over the tokens in `keep` [b, t], without alpha."""
    f = E / (K * keep.sum()) * CHOSEN[layer][keep].sum(0)
    return (f * SCORES[layer][keep].mean(0)).sum()


def test_over_sequences():
    wanted = [
        sum(float(ROWS[b]) * one(layer, REAL & (np.arange(B) == b)[:, None]) for b in range(B))
        for layer in range(L)
    ]
    np.testing.assert_allclose(router.balance(aux(), ROWS, "sequence"), wanted, rtol=1e-5)


def test_over_the_batch():
    wanted = [float(jnp.sum(ROWS)) * one(layer, REAL) for layer in range(L)]
    np.testing.assert_allclose(router.balance(aux(), ROWS, "batch"), wanted, rtol=1e-5)


def test_z_is_the_mean_square_of_a_rows_normalisers():
    wanted = [
        sum(float(ROWS[b]) * (NORMALISERS[layer, b][REAL[b]] ** 2).mean() for b in range(B))
        for layer in range(L)
    ]
    np.testing.assert_allclose(router.z(aux(), ROWS), wanted, rtol=1e-5)


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_even_work_costs_one_and_all_work_of_one_expert_as_many_as_there_are(over):
    tokens = 6.0
    even = jnp.full((1, 1, E), tokens / E)
    single = jnp.zeros((1, 1, E)).at[..., 2].set(tokens)
    for each, wanted in ((even, 1.0), (single, E)):
        both = {"router_load": K * each, "router_probability": each}
        assert float(router.balance(both, jnp.ones(1), over)[0]) == pytest.approx(wanted)
        assert float(router.max_load(K * each[:, 0])) == pytest.approx(wanted)


def test_an_overworked_experts_score_is_pushed_down():
    values = aux()

    def total(probability):
        return jnp.sum(
            router.balance({**values, "router_probability": probability}, ROWS, "batch")[0]
        )

    pushed = np.asarray(jax.grad(total)(values["router_probability"]))[0].sum(0)
    assert np.argmax(pushed) == np.argmax(np.asarray(values["router_load"])[0].sum(0))


def test_rows_of_padding_cost_nothing():
    empty = {name: jnp.zeros_like(value) for name, value in aux().items()}
    for value in (router.balance(empty, ROWS, "sequence"), router.z(empty, ROWS)):
        assert not np.any(value)
    assert float(router.max_load(jnp.zeros((L, E)))) == 0
