"""A learned product between named dims."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.ops.matmul import project, project_rows

INIT_STD = 0.02


class Buffer(nnx.Variable):
    """A variable that checkpoints hold and no optimizer touches; made like an nnx.Param, with
    axes."""


class Linear(nnx.Module):
    """y = x @ weight (+ bias), from dims `inner` to dims `outer`, e.g. (d,) -> (n, h).

    `axes` names the dims of the weight, inner ones first. The weight starts as a normal of standard
    deviation `std`.
    """

    def __init__(
        self,
        inner: tuple[int, ...],
        outer: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        bias: bool = False,
        std: float = INIT_STD,
        rngs: nnx.Rngs,
    ):
        self.contract = len(inner)
        self.flipped = False
        value = std * jax.random.normal(rngs.params(), inner + outer, jnp.float32)
        self.weight = nnx.Param(value, axes=axes)
        self.bias = (
            nnx.Param(jnp.zeros(outer, jnp.float32), axes=axes[len(inner) :]) if bias else None
        )

    def flip(self, dims: int) -> None:
        """Stores the weight, whose last `dims` dims are inner and outer, with outer dims first."""
        value = self.weight[...]
        lead = value.ndim - dims
        inner = tuple(range(lead, lead + self.contract))
        outer = tuple(range(lead + self.contract, value.ndim))
        order = (*range(lead), *outer, *inner)
        axes = tuple(self.weight.get_metadata()["axes"])
        swapped = (*axes[self.contract :], *axes[: self.contract])
        self.weight = nnx.Param(jnp.transpose(value, order), axes=swapped)
        self.flipped = True

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inner] -> [..., outer], in x's dtype."""
        product = project_rows if self.flipped else project
        y = product(x, self.weight[...], self.contract)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def depth_std(layers: int) -> float:
    """Initial standard deviation of projections that write to the residual stream, 0.02 / sqrt(2
    layers): GPT-2's rule."""
    return INIT_STD / math.sqrt(2 * layers)
