"""Sampling against the distribution that it should follow, counted over many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.ops.sample import sample

V, DRAWS = 12, 4000
LOGITS = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)


@jax.jit
def draw(logits, key, temperature, top_k, top_p):
    return sample(logits, key, temperature, top_k, top_p)


def counts(temperature=1.0, top_k=0, top_p=1.0):
    """Shares of each token in DRAWS independent draws from the same logits."""
    rows = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, V))
    tokens, _ = draw(
        rows, jax.random.key(7), jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    )
    return np.bincount(np.asarray(tokens), minlength=V) / DRAWS


def chances(temperature=1.0, top_k=0, top_p=1.0):
    """The distribution by sorting in numpy: temperature, then the k first, then the nucleus."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept, total = [], 0.0
    for token in order[: top_k or V]:
        kept.append(token)
        total += p[token]
        if total >= top_p:
            break
    result = np.zeros(V)
    result[kept] = p[kept] / p[kept].sum()
    return result


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_k": 5, "top_p": 0.9, "temperature": 1.5},
        {"top_k": V + 5},
    ],
)
def test_draws_follow_the_distribution(knobs):
    found, wanted = counts(**knobs), chances(**knobs)
    assert not np.any(found[wanted == 0])
    # Four standard deviations of a share of DRAWS draws.
    assert np.all(np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / DRAWS))


@pytest.mark.parametrize("knobs", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrow_ends_are_greedy(knobs):
    assert counts(**knobs)[np.argmax(LOGITS)] == 1.0


def test_rows_are_drawn_apart_and_scored_by_the_unmodified_logits():
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, (5, V)), jnp.float32)
    one = (jnp.float32(0.7), jnp.int32(4), jnp.float32(0.8))
    tokens, scores = draw(logits, jax.random.key(0), *one)
    assert tokens.dtype == jnp.int32 and scores.dtype == jnp.float32
    wanted = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)[:, None], 1
    )
    np.testing.assert_allclose(scores, wanted[:, 0], rtol=1e-5, atol=1e-6)
    again, _ = draw(logits, jax.random.key(0), *one)
    np.testing.assert_array_equal(tokens, again)
    several = {tuple(np.asarray(draw(logits, jax.random.key(i), *one)[0])) for i in range(8)}
    assert len(several) > 1


def test_logits_of_minus_infinity_are_never_drawn():
    banned = jnp.asarray(LOGITS).at[np.argmax(LOGITS)].set(-jnp.inf)
    rows = jnp.broadcast_to(banned, (200, V))
    tokens, scores = draw(rows, jax.random.key(0), jnp.float32(1), jnp.int32(0), jnp.float32(1))
    assert np.argmax(LOGITS) not in np.asarray(tokens) and np.all(np.isfinite(scores))
