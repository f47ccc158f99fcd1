"""Routing against the same rules written out in numpy, token by token; and what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ropewalk import models
from ropewalk.core.errors import ConfigError
from ropewalk.layers.router import Router, Routing

B, T, D, E = 3, 10, 6, 12
CASES = {
    "mixtral": Routing(E, 2, renormalise=True),
    "qwen3_moe": Routing(E, 3),
    "deepseek_v2": Routing(E, 3, groups=4, top_groups=2, scaling=16.0),
    "deepseek_v3": Routing(
        E, 4, score="sigmoid", selection_bias=True, groups=4, top_groups=2, group_score="best_two",
        renormalise=True, scaling=2.5,
    ),
    "gpt_oss": Routing(E, 4, logit_bias=True, renormalise=True),
    "llama4_text": Routing(E, 1, score="sigmoid", on_input=True),
}  # fmt: skip
REAL = np.ones((B, T), bool)
REAL[0, -4:] = REAL[2, :3] = False


def made(name):
    router = Router(D, CASES[name], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for variable in (router.weight, router.bias, router.selection_bias):
        if variable is not None:
            shape = variable.get_value().shape
            variable.set_value(jnp.asarray(rng.standard_normal(shape), jnp.float32))
    return router, jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)


def by_hand(router, token):
    """Experts and weights of one token, float64."""
    routing = router.routing
    logits = np.asarray(token, np.float64) @ np.asarray(router.weight[...], np.float64)
    if routing.logit_bias:
        logits = logits + np.asarray(router.bias[...])
    if routing.score == "softmax":
        scores = np.exp(logits) / np.exp(logits).sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    rank = scores + (np.asarray(router.selection_bias[...]) if routing.selection_bias else 0)
    groups = rank.reshape(routing.groups, -1)
    best = np.sort(groups, axis=1)[:, -1 if routing.group_score == "best" else -2 :].sum(1)
    kept = np.argsort(-best)[: routing.top_groups] if routing.groups > 1 else [0]
    allowed = [e for e in range(E) if e // (E // routing.groups) in kept]
    chosen = sorted(allowed, key=lambda e: -rank[e])[: routing.top_k]
    weights = scores[chosen]
    if routing.renormalise:
        weights = weights / weights.sum()
    return chosen, weights * routing.scaling, scores, np.log(np.exp(logits).sum())


@pytest.mark.parametrize("name", CASES)
def test_choices_are_those_of_the_rules(name):
    router, x = made(name)
    choice, _ = jax.jit(lambda x: router(x, jnp.asarray(REAL)))(x)
    for place in zip(*np.nonzero(REAL), strict=True):
        chosen, weights, *_ = by_hand(router, x[place])
        assert choice.expert[place].tolist() == chosen
        np.testing.assert_allclose(choice.weight[place], weights, rtol=1e-5)
    assert np.all(np.asarray(choice.expert)[~REAL] == E)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_reports_are_sums_over_the_real_tokens_of_a_row(name):
    router, x = made(name)
    _, report = router(x, jnp.asarray(REAL))
    load, probability, z = np.zeros((B, E)), np.zeros((B, E)), np.zeros(B)
    for row, t in zip(*np.nonzero(REAL), strict=True):
        chosen, _, scores, normaliser = by_hand(router, x[row, t])
        load[row, chosen] += 1
        probability[row] += scores / scores.sum()
        z[row] += normaliser**2
    np.testing.assert_array_equal(report["router_load"], load)
    np.testing.assert_allclose(report["router_probability"], probability, rtol=1e-5)
    np.testing.assert_allclose(report["router_z"], z, rtol=1e-4)


def test_scores_that_round_to_one_do_not_tie():
    router, _ = made("llama4_text")
    router.weight.set_value(jnp.arange(D * E, dtype=jnp.float32).reshape(D, E))
    choice, _ = router(jnp.ones((1, 1, D)), jnp.ones((1, 1), bool))
    assert choice.expert[0, 0, 0] == E - 1
    assert choice.weight[0, 0, 0] == 1.0


def test_the_selection_bias_has_no_gradient_and_the_scores_do():
    router, x = made("deepseek_v3")

    def total(router):
        choice, _ = router(x, jnp.asarray(REAL))
        return jnp.sum(choice.weight[..., 0])

    grads = jax.grad(total)(router)
    assert not np.any(grads.selection_bias[...])
    assert np.any(np.asarray(grads.weight[...]) != 0)


def test_logits_of_bfloat16_are_float32():
    router, x = made("mixtral")
    narrow = x.astype(jnp.bfloat16)
    one, _ = router(narrow, jnp.asarray(REAL))
    other, _ = router(narrow.astype(jnp.float32), jnp.asarray(REAL))
    np.testing.assert_array_equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"experts": 4, "top_k": 5}, "num_experts_per_tok = 5 is more than the 4"),
        ({"experts": 8, "top_k": 3, "groups": 4}, "more than the 2"),
        ({"experts": 8, "top_k": 1, "groups": 3}, "8 experts do not divide into 3"),
        ({"experts": 8, "top_k": 1, "groups": 2, "top_groups": 3}, "of which 3 are kept"),
        (
            {"experts": 8, "top_k": 1, "groups": 8, "group_score": "best_two"},
            "best two experts, and each of 8 groups of 8 experts has 1; lower n_group",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Routing(**values)


def test_a_recipe_that_asks_for_too_many_experts_is_told_the_key():
    with pytest.raises(ConfigError, match="model: num_experts_per_tok = 9 is more than the 8"):
        models.from_recipe({"preset": "mixtral-8x7b", "num_experts_per_tok": 9})
