"""The feed-forward part of a block."""

import functools
from typing import Any

import jax
from flax import nnx

from ropewalk.layers.linear import INIT_STD, Linear
from ropewalk.parallel.axes import shard

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
}


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)). arXiv:2002.05202"""

    def __init__(
        self,
        size: int,
        inner: int,
        *,
        activation: str,
        bias: bool = False,
        out_std: float = INIT_STD,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.gate = Linear((size,), (inner,), ("embed", "mlp"), bias=bias, rngs=rngs)
        self.up = Linear((size,), (inner,), ("embed", "mlp"), bias=bias, rngs=rngs)
        self.down = Linear((inner,), (size,), ("mlp", "embed"), bias=bias, std=out_std, rngs=rngs)

    def __call__(self, x: jax.Array, ctx: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[b, t, d] -> ([b, t, d], nothing to report); what all layers share is not needed."""
        inner = ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)
        return self.down(shard(inner, "batch", "time", "mlp")), {}


class MLP(nnx.Module):
    """down(activation(up(x))), with biases."""

    def __init__(
        self,
        size: int,
        inner: int,
        *,
        activation: str,
        out_std: float = INIT_STD,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.up = Linear((size,), (inner,), ("embed", "mlp"), bias=True, rngs=rngs)
        self.down = Linear((inner,), (size,), ("mlp", "embed"), bias=True, std=out_std, rngs=rngs)

    def __call__(self, x: jax.Array, ctx: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """As `GatedMLP`."""
        inner = ACTIVATIONS[self.activation](self.up(x))
        return self.down(shard(inner, "batch", "time", "mlp")), {}
