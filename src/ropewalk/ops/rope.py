"""Rotary position embedding (arXiv:2104.09864)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Radians per position of each pair, [h/2] float64."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def llama3_frequencies(
    base: np.ndarray,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_length: int,
) -> np.ndarray:
    """Llama 3.1's stretch: long waves divided by `factor`, short ones kept, a ramp between.
    arXiv:2407.21783"""
    turns = original_length * base / (2 * math.pi)
    width = max(high_freq_factor - low_freq_factor, 1e-9)
    keep = np.clip((turns - low_freq_factor) / width, 0.0, 1.0)
    return base * (keep + (1 - keep) / factor)


def yarn_frequencies(
    base: np.ndarray,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_length: int,
    truncate: bool,
) -> np.ndarray:
    """YaRN's blend of interpolation (slow pairs) and extrapolation (fast pairs).
    arXiv:2309.00071"""
    pairs = len(base)

    def pair_of(turns: float) -> float:
        return pairs * math.log(original_length / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0.0, 1.0)
    return base * ((1 - ramp) + ramp / factor)


def angles(
    positions: jax.Array, frequencies: npt.ArrayLike, scale: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position, each [b, t, h/2] float32, multiplied by `scale`;
    frequencies in radians per position, [h/2] or [b, 1, h/2]."""
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Turns pairs of features of x [b, t, n, h] by their angles, cos and sin [b, t, r/2]; features
    from r on stay as they are. Computed in float32.

    A pair is (i, i + r/2), or (2i, 2i + 1) where `interleaved`.
    """
    turned = 2 * cos.shape[-1]
    part, rest = x[..., :turned].astype(jnp.float32), x[..., turned:]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if interleaved:
        first, second = part[..., 0::2], part[..., 1::2]
    else:
        first, second = jnp.split(part, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        part = jnp.stack(pair, axis=-1).reshape(part.shape)
    else:
        part = jnp.concatenate(pair, axis=-1)
    part = part.astype(x.dtype)
    return jnp.concatenate([part, rest], axis=-1) if rest.shape[-1] else part
