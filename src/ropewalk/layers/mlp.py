"""The gated feed-forward part of a block."""

import functools

import jax
from flax import nnx

from ropewalk.layers.linear import INIT_STD, Linear
from ropewalk.parallel.axes import shard

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
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

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, d] -> [b, t, d]"""
        inner = ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)
        return self.down(shard(inner, "batch", "time", "mlp"))
