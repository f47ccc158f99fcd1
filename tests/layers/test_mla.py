"""Latent attention: against the formulas in numpy, and its two ways against each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ropewalk.layers.attention import Context, Turn
from ropewalk.layers.lm import parameters
from ropewalk.layers.mla import LatentAttention, Spec
from ropewalk.layers.rope import Default

B, T, D = 2, 12, 24
SIZES = {"hidden": D, "heads": 4, "latent": 10, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}


def made(query_latent, interleaved=False, bias=False):
    spec = Spec(**SIZES, query_latent=query_latent, scale=0.3, bias=bias)
    layer = LatentAttention(spec, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    layer = jax.tree.map(
        lambda p: jnp.asarray(0.4 * rng.standard_normal(p.shape) + (p.ndim == 1), jnp.float32),
        layer,
    )
    rotation = Default().rotation(SIZES["rope_dim"], 1e4, 64)

    def context(positions, segments):
        turn = Turn(*rotation.angles(positions), interleaved)
        return Context(positions, segments, {"default": turn})

    x = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return layer, context, x, positions


def rms(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def turned(x, positions):
    """Pairs (i, i + 2) as complex numbers; x [..., 4]."""
    angle = positions[..., None] * 1e4 ** (-np.arange(0, 4, 2) / 4)
    z = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("query_latent", [None, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_formulas(query_latent, bias):
    layer, context, x, positions = made(query_latent, bias=bias)
    w = {k: np.asarray(v, np.float64) for k, v in parameters(layer).items()}
    mine, _ = layer(x, context(positions, jnp.ones_like(positions)))
    for row in range(B):
        h, p = np.asarray(x[row], np.float64), np.arange(T)
        down = h @ w["down.weight"] + w.get("down.bias", 0)
        latent, shared = rms(down[:, :10], w["norm.scale"]), turned(down[:, 10:], p)
        source = h
        if query_latent:
            source = h @ w["query.down.weight"] + w.get("query.down.bias", 0)
            source = rms(source, w["query.norm.scale"])
        y = w.get("out.bias", 0)
        for n in range(4):
            q = source @ w["query.up.weight" if query_latent else "query.weight"][:, n]
            q = np.concatenate([q[:, :6], turned(q[:, 6:], p)], -1)
            k = np.concatenate([latent @ w["key_up.weight"][n].T, shared], -1)
            scores = np.where(np.tri(T, dtype=bool), q @ k.T * 0.3, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            y = y + weights @ (latent @ w["value_up.weight"][n].T) @ w["out.weight"][n]
        np.testing.assert_allclose(mine[row], y, atol=2e-5)


@pytest.mark.parametrize("query_latent", [None, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_prefill_and_decode_from_the_latents_equal_the_whole(query_latent, interleaved):
    layer, context, x, positions = made(query_latent, interleaved)
    ones = jnp.ones_like(positions)
    whole, _ = layer(x, context(positions, ones))
    cache = layer.init_cache(B, T, jnp.float32)
    assert [buffer.shape for buffer in cache.buffers] == [(B, 1, T, 14)]
    found = []
    for first, last in ((0, 7), (7, 8), (8, 9), (9, 12)):
        span = slice(first, last)
        y, cache = layer(x[:, span], context(positions[:, span], ones[:, span]), cache)
        found.append(y)
    np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=1e-5)
    # Both ways were taken.
    assert layer._absorbs(1, T) and not layer._absorbs(7, 7)


def test_a_decoding_step_reads_no_more_than_latents_and_weights():
    layer = LatentAttention(
        Spec(64, 8, 64, None, nope_dim=32, rope_dim=16, value_dim=32, scale=0.1), rngs=nnx.Rngs(0)
    )
    rotation, length = Default().rotation(16, 1e4, 64), 4096

    def step(layer, x, position, cache):
        turn = Turn(*rotation.angles(position))
        return layer(x, Context(position, jnp.ones_like(position), {"default": turn}), cache)

    cache = jax.eval_shape(lambda: layer.init_cache(1, length, jnp.float32))
    x = jax.ShapeDtypeStruct((1, 1, 64), jnp.float32)
    position = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    compiled: Any = jax.jit(step, donate_argnums=3).lower(layer, x, position, cache).compile()
    latents = length * (64 + 16) * 4
    # Keys and values of all heads would be 8 * (32 + 16 + 32) * 4 bytes a token, eight times that;
    # beside scores of 8 heads, nothing of the cache's length is made.
    found: Any = compiled.memory_analysis()
    assert found.temp_size_in_bytes < latents / 2
