"""Normalisation with a learned scale."""

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.ops.norm import rms_norm


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dim, which `axis` names; the scale starts at one.

    With `around_one`, what is stored is the scale's distance from one, as Gemma does.
    """

    def __init__(self, size: int, *, eps: float, axis: str = "embed", around_one: bool = False):
        self.eps = eps
        self.around_one = around_one
        start = jnp.zeros if around_one else jnp.ones
        self.scale = nnx.Param(start(size, jnp.float32), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., d]"""
        scale = self.scale[...]
        return rms_norm(x, 1 + scale.astype(jnp.float32) if self.around_one else scale, self.eps)
