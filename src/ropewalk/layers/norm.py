"""Normalisation with a learned scale."""

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.ops.norm import rms_norm


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dim, which `axis` names; the scale starts at one."""

    def __init__(self, size: int, *, eps: float, axis: str = "embed"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., d]"""
        return rms_norm(x, self.scale[...], self.eps)
