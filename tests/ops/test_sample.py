"""Sampling against the distribution that it should follow, counted over many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.ops.sample import allowed, greedy, logprob, penalized, sample

V, DRAWS = 300, 20000
LOGITS = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@jax.jit
def draw(logits, chance, temperature, top_k, top_p, min_p):
    return sample(logits, chance, temperature, top_k, top_p, min_p)


def rows(knobs, count):
    """Every knob, a row each."""
    values = {**DEFAULTS, **knobs}
    kinds = {"top_k": jnp.int32}
    return [jnp.full(count, value, kinds.get(name, jnp.float32)) for name, value in values.items()]


def chances(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution by sorting in numpy: temperature, the k first, the nucleus, the least
    share."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)[: top_k or V]
    inside = p[order] / p[order].sum()
    before = np.cumsum(inside) - inside
    kept = order[(before < top_p) & (p[order] >= min_p * p.max())]
    result = np.zeros(V)
    result[kept] = p[kept] / p[kept].sum()
    return result


KNOBS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"top_p": 0.99, "temperature": 3.0},
    {"top_k": 5, "top_p": 0.9, "temperature": 1.5},
    {"top_k": 150, "top_p": 0.97, "temperature": 2.5},
    {"min_p": 0.2},
    {"min_p": 0.001, "top_p": 0.95},
    {"top_k": V + 5},
]


@pytest.mark.parametrize("knobs", KNOBS)
def test_draws_follow_the_distribution(knobs):
    chance = jax.random.uniform(jax.random.key(7), (DRAWS,))
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, V))
    tokens = np.asarray(draw(logits, chance, *rows(knobs, DRAWS)))
    found, wanted = np.bincount(tokens, minlength=V) / DRAWS, chances(**knobs)
    assert not np.any(found[wanted == 0])
    # Five standard deviations of a share of DRAWS draws, and one draw.
    bound = 5 * np.sqrt(wanted * (1 - wanted) / DRAWS) + 1 / DRAWS
    assert np.all(np.abs(found - wanted) <= bound)


def test_every_row_has_its_own_knobs():
    """All settings in one batch give what each gives alone, greedy ones among them."""
    settings = [*KNOBS, {"temperature": 0.0}]
    chance = jax.random.uniform(jax.random.key(1), (len(settings),))
    logits = jax.random.normal(jax.random.key(2), (len(settings), V)) * 2
    each = [rows(knobs, 1) for knobs in settings]
    together = [jnp.concatenate(column) for column in zip(*each, strict=True)]
    found = draw(logits, chance, *together)
    alone = [draw(logits[i : i + 1], chance[i : i + 1], *knobs)[0] for i, knobs in enumerate(each)]
    assert found.tolist() == [int(token) for token in alone]
    assert found[-1] == np.argmax(logits[-1])


@pytest.mark.parametrize("chance", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("knobs", KNOBS)
def test_no_chance_leads_to_a_token_without_weight(chance, knobs):
    logits = jnp.where(jnp.arange(V) % 3 == 1, jnp.asarray(LOGITS), -1e30)[None]
    token = int(draw(logits, jnp.full(1, chance), *rows(knobs, 1))[0])
    assert token % 3 == 1


def test_logprobs_are_of_the_whole_distribution():
    logits = jnp.asarray(LOGITS)[None]
    token = greedy(logits)
    wide = LOGITS.astype(np.float64)
    wanted = wide.max() - np.log(np.sum(np.exp(wide)))
    assert int(token[0]) == np.argmax(LOGITS)
    np.testing.assert_allclose(float(logprob(logits, token)[0]), wanted, atol=1e-5)


def test_the_first_of_equals_is_taken():
    assert greedy(jnp.zeros((2, 5))).tolist() == [0, 0]


def test_penalties_by_hand():
    logits = jnp.array([[2.0, -1.0, 0.5, 0.25]])
    written, prompted = jnp.array([[2, 0, 1, 0]]), jnp.array([[False, True, False, False]])
    one = jnp.ones(1)
    found = penalized(logits, written, prompted, 0.5 * one, 0.25 * one, 2.0 * one)
    # 2 / 2 - 0.5 - 2 * 0.25; -1 * 2; 0.5 / 2 - 0.5 - 0.25; as it was
    np.testing.assert_allclose(found, [[0.0, -2.0, -0.5, 0.25]])


def test_bits_say_which_tokens_are_allowed():
    kept = np.random.default_rng(3).random(70) < 0.3
    words = np.zeros(3, np.uint32)
    for token in np.flatnonzero(kept):
        words[token // 32] |= np.uint32(1 << (token % 32))
    found = allowed(jnp.zeros((1, 70)), jnp.asarray(words)[None])[0]
    assert ((found == 0) == kept).all()
