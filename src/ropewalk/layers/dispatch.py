"""Bringing tokens to their experts and back, behind one signature: every expert on every token, no
token dropped, or a fixed number of places an expert."""

import functools
import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ropewalk.layers.router import Choice
from ropewalk.ops.experts import Act, Rows, Weights, experts
from ropewalk.parallel.axes import Placement, on_one_device, partition, spread

Dispatch = Callable[[jax.Array, Choice, Weights, Act, bool], jax.Array]


def everywhere(dispatch: Dispatch) -> Dispatch:
    """The dispatch of one device, on each device of a mesh: for the tokens and with the experts, or
    the inner features of experts, that lie there.

    Devices that share tokens and have different experts swap tokens first and add up what comes
    out. A row is never cut.
    """

    @functools.wraps(dispatch)
    def spread_out(
        x: jax.Array, choice: Choice, weights: Weights, act: Act, on_input: bool
    ) -> jax.Array:
        placement = spread()
        if placement is None:
            return dispatch(x, choice, weights, act, on_input)
        return _on_mesh(dispatch, placement, x, choice, weights, act, on_input)

    return spread_out


def _on_mesh(
    dispatch: Dispatch,
    placement: Placement,
    x: jax.Array,
    choice: Choice,
    weights: Weights,
    act: Act,
    on_input: bool,
) -> jax.Array:
    def place(array: jax.Array, *axes: str | None) -> PartitionSpec:
        return partition(array.shape, axes, placement)

    weights = jax.tree.map(lambda weight: weight.astype(x.dtype), weights)
    rows = place(x, "batch", None, None)
    columns = place(weights.gate, "experts", None, "mlp")
    expert_axes, mlp_axes = _names(columns, 0), _names(columns, 2)
    swapped = tuple(name for name in expert_axes if name in _names(rows, 0))
    axes = ((None, "mlp"), (None, "mlp"), ("mlp", None), ("mlp",), ("mlp",), (None,))
    places = tuple(
        None if weight is None else place(weight, "experts", *each)
        for weight, each in zip(weights, axes, strict=True)
    )

    def local(x: jax.Array, choice: Choice, arrays: tuple[jax.Array | None, ...]) -> jax.Array:
        weights = Weights(*cast("tuple[jax.Array, ...]", arrays))
        if swapped:
            x, choice = jax.tree.map(
                lambda a: jax.lax.all_gather(a, swapped, axis=0, tiled=True), (x, choice)
            )
        if expert_axes:
            mine = weights.gate.shape[0]
            number = choice.expert - jax.lax.axis_index(expert_axes) * mine
            choice = choice._replace(
                expert=jnp.where((number >= 0) & (number < mine), number, mine)
            )
        if mlp_axes and weights.down_bias is not None:  # added once, not on every device
            first = jax.lax.axis_index(mlp_axes) == 0
            weights = weights._replace(down_bias=jnp.where(first, weights.down_bias, 0))
        with on_one_device():
            y = dispatch(x, choice, weights, act, on_input)
        whole = (*mlp_axes, *(name for name in expert_axes if name not in swapped))
        y = jax.lax.psum(y, whole) if whole else y
        return jax.lax.psum_scatter(y, swapped, tiled=True) if swapped else y

    run = jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=(rows, rows, places),
        out_specs=rows,
        check_vma=False,
    )
    return run(x, choice, tuple(weights))


def _names(place: PartitionSpec, dim: int) -> tuple[str, ...]:
    names = place[dim] if dim < len(place) else None
    return (names,) if isinstance(names, str) else names or ()


@everywhere
def dense(x: jax.Array, choice: Choice, weights: Weights, act: Act, on_input: bool) -> jax.Array:
    """[b, t, d] of x [b, t, d]: of every token the sum of its experts' outputs, each times its
    weight; with `on_input` the weight multiplies what enters instead.

    The reference: every expert works on every token.
    """
    chosen = choice.expert[..., None] == jnp.arange(weights.gate.shape[0])  # [b, t, k, e]
    share = jnp.sum(choice.weight[..., None] * chosen, axis=2).astype(x.dtype)
    rows = jnp.einsum("btd,bte->betd", x, share if on_input else jnp.ones_like(share))
    y = _each(rows, weights, act)
    return jnp.einsum("betd,bte->btd", y, jnp.any(chosen, axis=2) if on_input else share)


@everywhere
def dropless(x: jax.Array, choice: Choice, weights: Weights, act: Act, on_input: bool) -> jax.Array:
    """As `dense`: tokens sorted by their expert, the work proportional to the choices."""
    b, t, d = x.shape
    k, e = choice.expert.shape[-1], weights.gate.shape[0]
    expert, share = choice.expert.reshape(-1), choice.weight.reshape(-1, k)
    order = jnp.argsort(expert)
    sizes = jnp.sum(expert[:, None] == jnp.arange(e), axis=0, dtype=jnp.int32)
    place = jnp.argsort(order).reshape(-1, k).astype(jnp.int32)
    rows = x.reshape(-1, d)
    if on_input:
        rows = (rows[:, None] * share[..., None].astype(x.dtype)).reshape(-1, d)
        source, share = order, jnp.ones_like(share)
    else:
        source = order // k
    return experts(rows, weights, share, Rows(source, sizes, place), act).reshape(b, t, d)


def capacity(factor: float) -> Dispatch:
    """As `dense`, but an expert has places for `factor` times its fair share of a row's choices;
    what comes after they are full is dropped, the choices of later tokens first."""

    def dispatch(
        x: jax.Array, choice: Choice, weights: Weights, act: Act, on_input: bool
    ) -> jax.Array:
        _, t, k = choice.expert.shape
        places = max(1, math.ceil(factor * t * k / weights.gate.shape[0]))
        if places >= t:  # nothing can overflow
            return dropless(x, choice, weights, act, on_input)
        return everywhere(functools.partial(_dropping, places))(x, choice, weights, act, on_input)

    return dispatch


def _dropping(
    places: int, x: jax.Array, choice: Choice, weights: Weights, act: Act, on_input: bool
) -> jax.Array:
    (b, _, d), e = x.shape, weights.gate.shape[0]
    chosen = choice.expert[..., None] == jnp.arange(e)  # [b, t, k, e]
    before = jnp.cumsum(jnp.any(chosen, axis=2), axis=1) - 1  # its place at each expert
    place = jnp.sum(jnp.where(chosen, before[:, :, None], 0), axis=-1)  # [b, t, k]
    place = jnp.where((choice.expert < e) & (place < places), place, places)
    row = jnp.arange(b)[:, None, None]
    share = choice.weight[..., None].astype(x.dtype)
    sent = x[:, :, None] * share if on_input else jnp.broadcast_to(x[:, :, None], (*place.shape, d))
    held = jnp.zeros((b, e, places, d), x.dtype)
    held = held.at[row, choice.expert, place].set(sent, mode="drop")
    y = _each(held, weights, act)
    back = y.at[row, choice.expert, place].get(mode="fill", fill_value=0)
    return jnp.sum(back if on_input else back * share, axis=2)


def choose(name: str, factor: float) -> Dispatch:
    """The dispatch of a layout's `experts`, with a capacity factor; `auto` drops nothing."""
    return {"dense": dense, "capacity": capacity(factor)}.get(name, dropless)


def _each(rows: jax.Array, weights: Weights, act: Act) -> jax.Array:
    """Rows [b, e, c, d] through their expert."""

    def product(rows: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = jnp.einsum("becd,edf->becf", rows, weight.astype(rows.dtype))
        return y if bias is None else y + bias[:, None].astype(y.dtype)

    gate = product(rows, weights.gate, weights.gate_bias)
    up = product(rows, weights.up, weights.up_bias)
    return product(act(gate, up), weights.down, weights.down_bias)
