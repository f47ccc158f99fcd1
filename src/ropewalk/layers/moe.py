"""A feed-forward part of many experts, of which a router sends each token to a few."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.layers import dispatch
from ropewalk.layers.config import LMConfig
from ropewalk.layers.linear import INIT_STD, Linear, depth_std
from ropewalk.layers.mlp import ACTIVATIONS, GatedMLP
from ropewalk.layers.router import Router, Routing
from ropewalk.ops.experts import Act, Weights


def gated(activation: str) -> Act:
    """activation(gate) * up."""
    return functools.partial(_gated, ACTIVATIONS[activation])


def clipped(alpha: float, limit: float) -> Act:
    """gate sigmoid(alpha gate) (up + 1) of a gate cut above at `limit` and an up at both ends.
    arXiv:2508.10925"""
    return functools.partial(_clipped, alpha, limit)


class Experts(nnx.Module):
    """The matrices of all experts of a layer."""

    def __init__(
        self,
        count: int,
        size: int,
        inner: int,
        *,
        bias: bool,
        active_share: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        def matrix(shape: tuple[int, int], axes: tuple[str, str], std: float) -> nnx.Param:
            value = std * jax.random.normal(rngs.params(), (count, *shape), jnp.float32)
            return nnx.Param(value, axes=("experts", *axes))

        def vector(size: int, axis: str) -> nnx.Param | None:
            zeros = jnp.zeros((count, size), jnp.float32)
            return nnx.Param(zeros, axes=("experts", axis)) if bias else None

        self.active_share = active_share
        self.gate = matrix((size, inner), ("embed", "mlp"), INIT_STD)
        self.up = matrix((size, inner), ("embed", "mlp"), INIT_STD)
        self.down = matrix((inner, size), ("mlp", "embed"), out_std)
        self.gate_bias, self.up_bias = vector(inner, "mlp"), vector(inner, "mlp")
        self.down_bias = vector(size, "embed")

    def weights(self) -> Weights:
        """As arrays."""

        def value(vector: nnx.Param | None) -> jax.Array | None:
            return None if vector is None else vector[...]

        matrices = self.gate[...], self.up[...], self.down[...]
        return Weights(*matrices, *map(value, (self.gate_bias, self.up_bias, self.down_bias)))


class MoE(nnx.Module):
    """The chosen experts' outputs times their weights, and what a shared expert adds to every
    token, behind a gate of its own or not."""

    def __init__(
        self,
        size: int,
        experts: Experts,
        routing: Routing,
        act: Act,
        *,
        shared: GatedMLP | None = None,
        shared_gate: bool = False,
        rngs: nnx.Rngs,
    ):
        self.act, self.on_input = act, routing.on_input
        self.dispatch: dispatch.Dispatch = dispatch.dropless
        self.router = Router(size, routing, rngs=rngs)
        self.experts = experts
        self.shared = shared
        self.shared_gate = Linear((size,), (), ("embed",), rngs=rngs) if shared_gate else None

    def __call__(self, x: jax.Array, ctx: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x [b, t, d] -> ([b, t, d], what the router reports)."""
        choice, report = self.router(x, ctx.segment_ids > 0)
        y = self.dispatch(x, choice, self.experts.weights(), self.act, self.on_input)
        if self.shared is not None:
            more, _ = self.shared(x, ctx)
            if self.shared_gate is not None:
                more *= jax.nn.sigmoid(self.shared_gate(x))[..., None]
            y += more
        return y, report


def experts(
    c: LMConfig,
    rngs: nnx.Rngs,
    routing: Routing,
    inner: int,
    *,
    act: Act | None = None,
    bias: bool = False,
    shared: int = 0,
    shared_bias: bool = False,
    shared_gate: bool = False,
) -> MoE:
    """The experts of a layer in the sizes of a config; a shared one has `shared` inner features."""
    size, std = c.hidden_size, depth_std(c.num_hidden_layers)
    many = Experts(
        routing.experts,
        size,
        inner,
        bias=bias,
        active_share=routing.top_k / routing.experts,
        out_std=std,
        rngs=rngs,
    )
    one = (
        GatedMLP(size, shared, activation=c.hidden_act, bias=shared_bias, out_std=std, rngs=rngs)
        if shared
        else None
    )
    act = act or gated(c.hidden_act)
    return MoE(size, many, routing, act, shared=one, shared_gate=shared_gate, rngs=rngs)


def _gated(activation: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array):
    return activation(gate) * up


def _clipped(alpha: float, limit: float, gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)
