"""Normalisation with a learned scale."""

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.ops.norm import layer_norm, rms_norm


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dims, of the sizes and names given; the scale starts at
    one.

    With `around_one`, what is stored is the scale's distance from one, as Gemma does.
    """

    def __init__(
        self,
        *sizes: int,
        eps: float,
        axes: tuple[str, ...] = ("embed",),
        around_one: bool = False,
    ):
        self.eps = eps
        self.around_one = around_one
        self.dims = len(sizes)
        start = jnp.zeros if around_one else jnp.ones
        self.scale = nnx.Param(start(sizes, jnp.float32), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., d]"""
        scale = self.scale[...]
        scale = 1 + scale.astype(jnp.float32) if self.around_one else scale
        return rms_norm(x, scale, self.eps, self.dims)


class LayerNorm(nnx.Module):
    """Layer norm over the last dim with scale, which starts at one, and bias."""

    def __init__(self, size: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32), axes=("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., d]"""
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)
