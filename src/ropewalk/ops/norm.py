"""Normalisation, computed in float32."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array | None, eps: float, dims: int = 1) -> jax.Array:
    """Root-mean-square norm over the last `dims` dims; x [..., d], scale [d] or None -> [..., d].
    arXiv:1910.07467"""
    wide = x.astype(jnp.float32)
    over = tuple(range(-dims, 0))
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=over, keepdims=True) + eps)
    return (wide if scale is None else wide * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Mean zero and variance one over the last dim, then scale and bias [d]; x [..., d].
    arXiv:1607.06450"""
    wide = x.astype(jnp.float32)
    wide -= jnp.mean(wide, axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
