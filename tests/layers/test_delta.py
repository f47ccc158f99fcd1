"""The mixer against a token-by-token one written in numpy, in one piece and in several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ropewalk.layers.attention import Context
from ropewalk.layers.delta import GatedDelta, Spec, document_numbers
from ropewalk.layers.lm import parameters, with_parameters
from ropewalk.ops import delta_rule

B, T, D = 2, 80, 16
SPEC = Spec(hidden=D, key_heads=2, value_heads=4, key_dim=6, value_dim=5, width=4, norm_eps=1e-6)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@functools.cache
def layer():
    module = GatedDelta(SPEC, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    values = {
        path: value + 0.4 * rng.standard_normal(value.shape).astype(np.float32)
        for path, value in parameters(module).items()
    }
    return with_parameters(module, values)


@functools.cache
def compiled():
    def run(module, x, segments, cache):
        return module(x, Context(jnp.zeros_like(segments), segments, {}), cache)

    return jax.jit(run)


def run(x, segments, cache=None):
    return compiled()(layer(), jnp.asarray(x), jnp.asarray(segments, jnp.int32), cache)


def sequence(t=T, seed=1):
    return np.random.default_rng(seed).standard_normal((B, t, D)).astype(np.float32)


def ones(t=T):
    return np.ones((B, t), np.int32)


def definition(x):
    """One document [t, d] -> [t, d], with each step as the paper has it, in float64."""
    p = {path: np.asarray(value, np.float64) for path, value in parameters(layer()).items()}
    group = SPEC.value_heads // SPEC.key_heads
    silu, sigmoid = lambda z: z / (1 + np.exp(-z)), lambda z: 1 / (1 + np.exp(-z))

    def part(name):
        taps, z = p[f"{name}.filter"], np.einsum("td,dnh->tnh", x, p[f"{name}.project.weight"])
        padded = np.concatenate([np.zeros((SPEC.width - 1, *z.shape[1:])), z])
        windows = np.lib.stride_tricks.sliding_window_view(padded, SPEC.width, axis=0)
        return silu(np.sum(windows * taps, axis=-1))

    q, k, v = part("query"), part("key"), part("value")
    q, k = (z / np.sqrt(np.sum(z * z, axis=-1, keepdims=True) + 1e-6) for z in (q, k))
    q, k = (np.repeat(z, group, axis=1) for z in (q / np.sqrt(SPEC.key_dim), k))
    beta = sigmoid(np.einsum("td,dkr->tkr", x, p["beta.weight"])).reshape(len(x), -1)
    decay = np.einsum("td,dkr->tkr", x, p["decay.weight"]).reshape(len(x), -1)
    alpha = np.exp(-np.exp(p["a_log"]) * np.log1p(np.exp(decay + p["dt_bias"])))
    gate = silu(np.einsum("td,dnh->tnh", x, p["norm_gate.weight"]))
    y = np.zeros_like(v)
    for n in range(SPEC.value_heads):
        state = np.zeros((SPEC.value_dim, SPEC.key_dim))
        for t in range(len(x)):
            key = k[t, n]
            erased = np.eye(SPEC.key_dim) - beta[t, n] * np.outer(key, key)
            state = alpha[t, n] * state @ erased + beta[t, n] * np.outer(v[t, n], key)
            y[t, n] = state @ q[t, n]
    normed = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + SPEC.norm_eps)
    return np.einsum("tnh,nhd->td", normed * p["norm.scale"] * gate, p["readout.weight"])


def test_equals_the_definition():
    x = sequence()
    y, _ = run(x, ones())
    for row in range(B):
        close(y[row], definition(x[row].astype(np.float64)))


def test_one_token_at_a_time_equals_all_at_once(monkeypatch):
    x, segments = sequence(), ones()
    whole, _ = run(x, segments)
    monkeypatch.setattr(delta_rule, "chunked", delta_rule.recurrent)
    compiled.cache_clear()
    stepwise, _ = run(x, segments)
    compiled.cache_clear()
    close(whole, stepwise)


def test_prefill_and_decode_equal_the_whole():
    x, whole = sequence(), run(sequence(), ones())[0]
    y, cache = run(x[:, :70], ones(70), layer().init_cache(B, T, jnp.float32))
    parts = [y]
    for t in range(70, T):
        y, cache = run(x[:, t : t + 1], ones(1), cache)
        parts.append(y)
    close(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("first", [1, 2, 5])
def test_a_prefill_in_pieces_with_padding_on_both_sides_stores_none_of_it(first):
    """Pieces shorter than the convolution is wide, each with padding before, within and after."""
    x = sequence()
    whole, _ = run(x, ones())
    cache, start = layer().init_cache(B, T, jnp.float32), 0
    for count in (first, 3, 7):
        stop, length = start + count, count + 6
        place = np.concatenate([[2], 4 + np.arange(count - 1)])
        padded, segments = sequence(length, seed=9), np.zeros((B, length), np.int32)
        padded[:, place], segments[:, place] = x[:, start:stop], 1
        y, cache = run(padded, segments, cache)
        close(y[:, place], whole[:, start:stop])
        start = stop


def test_a_packed_row_equals_its_documents_apart():
    x, lengths = sequence(), (2, 33, 40)
    segments, place = np.zeros((B, T), np.int32), 0
    for number, length in enumerate(lengths):
        segments[:, place : place + length] = (3, 1, 2)[number]
        place += length
    packed, _ = run(x, segments)
    place = 0
    for length in lengths:
        alone, apart = np.zeros((B, T, D), np.float32), np.zeros((B, T), np.int32)
        alone[:, :length], apart[:, :length] = x[:, place : place + length], 1
        close(packed[:, place : place + length], run(alone, apart)[0][:, :length])
        place += length


def test_what_other_documents_and_padding_hold_has_no_influence_at_all():
    x, other, segments = sequence(), sequence(seed=5), ones()
    segments[:, 30:50], segments[:, 50:60] = 2, 0
    mine = segments == 2
    mixed = np.where(mine[..., None], x, other)
    np.testing.assert_array_equal(run(x, segments)[0][mine], run(mixed, segments)[0][mine])


def test_gradients_of_padding_and_of_other_documents_are_zero():
    segments = ones()
    segments[:, :3], segments[:, 40:60], segments[:, 60:] = 0, 2, 0
    mine = jnp.asarray(segments == 2)[..., None]

    def loss(x):
        return jnp.sum(mine * jnp.sin(run(x, segments)[0]))

    grad = np.asarray(jax.grad(loss)(jnp.asarray(sequence())))
    assert np.all(grad[segments != 2] == 0) and np.all(np.isfinite(grad))
    assert np.all(np.any(grad[segments == 2] != 0, axis=-1))


def test_a_cache_is_as_large_for_a_long_sequence_as_for_a_short_one():
    sizes = [
        [leaf.shape for leaf in jax.tree.leaves(layer().init_cache(B, length, jnp.float32))]
        for length in (1, 1 << 20)
    ]
    assert sizes[0] == sizes[1]


def test_documents_are_numbered_over_padding():
    segments = jnp.array([[0, 0, 4, 4, 0, 4, 7, 0, 2, 2], [1, 0, 1, 3, 3, 3, 1, 1, 0, 0]])
    wanted = [[0, 0, 0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]
    np.testing.assert_array_equal(document_numbers(segments), wanted)
