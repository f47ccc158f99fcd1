"""Both forms against the recurrence written with matrices in float64, and against each other."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.ops import delta_rule

B, K, N, H, V = 2, 2, 4, 6, 5
FORMS: dict[str, Callable[..., Any]] = {
    "recurrent": delta_rule.recurrent,
    "chunked": delta_rule.chunked,
}
each = pytest.mark.parametrize("form", FORMS)
# Lengths around a chunk of 64 and a block of 512; the last two are made of uneven ones.
LENGTHS = (1, 5, 64, 65, 130, 513)
# How fast states fade: hardly, as models do, within a token, and so fast that no float32 holds it.
DECAYS = {"none": 0.0, "slow": 0.02, "usual": 1.0, "fast": 30.0, "beyond": 1e6}


def inputs(t, decay="usual", seed=0, padding=0.1, documents=4):
    """q, k, v, g, beta, documents, stored, state; all but the two before the last float64."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, t, K, H))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g = -DECAYS[decay] * np.exp(rng.standard_normal((B, t, N)))
    starts = rng.random((B, t)) < documents / t
    stored = rng.random((B, t)) >= padding
    return (
        q,
        k,
        rng.standard_normal((B, t, N, V)),
        g,
        rng.random((B, t, N)),
        np.cumsum(starts, axis=1).astype(np.int32),
        stored,
        rng.standard_normal((B, N, H, V)),
    )


def narrow(given):
    return tuple(jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else a.dtype) for a in given)


def definition(q, k, v, g, beta, documents, stored, state):
    """S_t = a (I - beta k k^T) S + beta k v^T, y = S^T q, for arrays of any precision."""

    def step(carry, token):
        q, k, v, g, beta, document, stored = token
        state, last = carry
        q, k = (jnp.repeat(x, N // K, axis=1) for x in (q, k))
        state = jnp.where((document == last)[:, None, None, None], state, 0)
        eye = jnp.eye(H, dtype=k.dtype)
        kept = eye - beta[..., None, None] * k[..., :, None] * k[..., None, :]
        faded = jnp.exp(g)[..., None, None] * state
        new = kept @ faded + (beta[..., None] * k)[..., :, None] * v[..., None, :]
        state = jnp.where(stored[:, None, None, None], new, state)
        return (state, document), jnp.einsum("bnhv,bnh->bnv", state, q)

    by_time = [jnp.swapaxes(x, 0, 1) for x in (q, k, v, g, beta, documents, stored)]
    (state, _), y = jax.lax.scan(step, (state, documents[:, 0]), by_time)
    return jnp.swapaxes(y, 0, 1), state


def outcome(form, given, weights):
    """y and the state, and the gradients of a weighted sum of both."""
    q, k, v, g, beta, documents, stored, state = given

    def loss(*parts):
        y, last = form(*parts[:5], documents, stored, parts[5])
        real = stored[:, :, None, None]
        return jnp.sum(real * jnp.sin(y) * weights[0]) + jnp.sum(last * weights[1]), (y, last)

    run = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(6)), has_aux=True))
    (_, values), grads = run(q, k, v, g, beta, state)
    return [*values, *grads]


@functools.cache
def expected(t, decay):
    given = inputs(t, decay)
    weights = np.random.default_rng(1).standard_normal((B, t, N, V)), given[-1]
    with jax.enable_x64(True):
        return given, weights, [np.asarray(a) for a in outcome(definition, given, weights)]


@each
@pytest.mark.parametrize(
    ("t", "decay"), [(t, "usual") for t in LENGTHS] + [(130, d) for d in DECAYS if d != "usual"]
)
def test_equals_the_definition_with_its_gradients(form, t, decay):
    given, weights, wanted = expected(t, decay)
    found = outcome(FORMS[form], narrow(given), narrow(weights))
    stored = given[6]
    found[0], wanted = found[0] * stored[..., None, None], list(wanted)
    wanted[0] = wanted[0] * stored[..., None, None]
    names = ("y", "S", "dq", "dk", "dv", "dg", "dbeta", "dS")
    for name, mine, theirs in zip(names, found, wanted, strict=True):
        scale = np.abs(theirs).max() or 1.0
        # Float32 over some hundred tokens that hardly fade; a sum of logarithms has an error of
        # 1e-7 of its size.
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-5 * scale, err_msg=name)


@each
def test_nothing_of_one_document_reaches_another(form):
    t, first = 150, 70
    q, k, v, g, beta, _, stored, state = narrow(inputs(t, "slow"))
    documents = jnp.broadcast_to((jnp.arange(t) >= first).astype(jnp.int32), (B, t))
    run = jax.jit(FORMS[form])
    y, last = run(q, k, v, g, beta, documents, stored, state)
    before = jnp.arange(t)[:, None] < first

    def changed(x, other):
        return jnp.where(before if x.ndim == 3 else before[..., None], other, x)

    y_other, last_other = run(
        changed(q, -1e3 * q),
        changed(k, k[:, ::-1]),
        changed(v, 1e3 * v),
        changed(g, 5 * g),
        changed(beta, 1 - beta),
        documents,
        stored,
        -state,
    )
    np.testing.assert_array_equal(y[:, first:], y_other[:, first:])
    np.testing.assert_array_equal(last, last_other)
    assert np.any(y[:, :first] != y_other[:, :first])


@each
def test_padding_changes_nothing(form):
    t, places = 100, np.sort(np.random.default_rng(2).choice(160, 100, replace=False))
    q, k, v, g, beta, documents, _, state = narrow(inputs(t))
    bare = FORMS[form](q, k, v, g, beta, documents, jnp.ones((B, t), bool), state)

    def spread(x, fill):
        return jnp.full((B, 160, *x.shape[2:]), fill, x.dtype).at[:, places].set(x)

    last = np.maximum(np.searchsorted(places, np.arange(160), side="right") - 1, 0)
    padded = FORMS[form](
        *(spread(x, 3.0) for x in (q, k, v)),
        spread(g, -2.0),
        spread(beta, 0.9),
        documents[:, last],
        spread(jnp.ones((B, t), bool), False),
        state,
    )
    np.testing.assert_allclose(padded[0][:, places], bare[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(padded[1], bare[1], rtol=1e-5, atol=1e-5)


@each
def test_a_sequence_may_be_cut_anywhere(form):
    given = narrow(inputs(140))
    whole, last = FORMS[form](*given)
    state, parts, start = given[-1], [], 0
    for stop in (1, 71, 140):
        y, state = FORMS[form](*(x[:, start:stop] for x in given[:7]), state)
        parts.append(y)
        start = stop
        if stop < 140:  # the state is of the first token's document in the next call
            same = (given[5][:, stop] == given[5][:, stop - 1])[:, None, None, None]
            state = jnp.where(same, state, 0.0)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-5)


def test_keys_that_are_all_the_same_are_solved():
    """Powers of the overlap grow beyond 1e17 here; its inverse has entries of one."""
    q, k, v, g, _, documents, stored, state = narrow(inputs(128, "none", documents=0, padding=0))
    k = jnp.broadcast_to(k[:, :1], k.shape)
    y, last = delta_rule.chunked(q, k, v, g, jnp.ones((B, 128, N)), documents, stored, state)
    # What is written last under a key is all that it holds.
    held = jnp.einsum("bnh,bnhv->bnv", jnp.repeat(k[:, 0], N // K, axis=1), last)
    np.testing.assert_allclose(held, v[:, -1], rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(y))


@each
def test_bfloat16_is_widened(form):
    given = narrow(inputs(70))
    q, k, v = (x.astype(jnp.bfloat16) for x in given[:3])
    y, state = FORMS[form](q, k, v, *given[3:])
    wide = FORMS[form](*(x.astype(jnp.float32) for x in (q, k, v)), *given[3:])
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_array_equal(y, wide[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(state, wide[1])


def test_a_gradient_keeps_a_state_every_fourth_chunk():
    """Beside the inputs, a backward pass of 4096 tokens keeps 16 states, and not 64 or 4096."""
    t, h = 4096, 64
    shapes = [(1, t, 1, h)] * 3 + [(1, t, 1)] * 2 + [(1, 1, h, h)]
    parts = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def pull(*parts):
        zeros = jnp.zeros((1, t), jnp.int32)

        def run(q, k, v, g, beta, state):
            return delta_rule.chunked(q, k, v, g, beta, zeros, zeros == 0, state)

        return jax.vjp(run, *parts)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, *parts))
    size = sum(np.prod(leaf.shape) for leaf in kept)
    given = sum(np.prod(shape) for shape in shapes)
    assert size < 1.1 * given + 17 * h * h
