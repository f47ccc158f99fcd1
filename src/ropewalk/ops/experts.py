"""Gated feed-forward experts over rows that lie expert after expert: every row meets the matrices
of its own expert, and the work is proportional to the rows.

XLA's `ragged_dot` does that on accelerators; on a CPU it multiplies every row with every expert's
matrix. There, loops over pieces of an expert's rows run its products while they are in the cache.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ropewalk.parallel.axes import platform

Act = Callable[[jax.Array, jax.Array], jax.Array]

# On a CPU the rows of an expert are multiplied at once, rounded up to one of these numbers: a few
# small ones, multiples of an eighth of a fair share up to twice that, and beyond them each twice
# the one before. Every product costs time to begin, and every number of rows a program of its own.
_SMALL = 8, 32
_STEPS, _SHARES = 8, 2
_LEAST_STEP = 64


class Weights(NamedTuple):
    """Of all experts: gate and up [e, d, f], down [e, f, d], and their biases [e, f], [e, f],
    [e, d] or None."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None


class Rows(NamedTuple):
    """Which rows there are, expert after expert; m of them.

    source int32 [m]: the row of x that a row is. sizes int32 [e]: how many are each expert's; what
    is left at the end is nobody's and counts as zero. place int32 [n, k]: the rows that are added
    up to an output, no row twice.
    """

    source: jax.Array
    sizes: jax.Array
    place: jax.Array


def experts(x: jax.Array, weights: Weights, share: jax.Array, rows: Rows, act: Act) -> jax.Array:
    """[n, d]: the rows of x through down(act(gate, up)) of their experts, each output the sum of
    its rows times share float32 [n, k]; in x's dtype.

    x is [n, d], and row i the source of what output i is made of, or [n k, d], with a row for each
    of them.
    """
    weights = jax.tree.map(lambda weight: weight.astype(x.dtype), weights)
    if platform() == "cpu":
        return _experts(act, x, weights, share, rows)
    row = jnp.take(x, rows.source, axis=0, mode="clip")
    numbers = jnp.arange(rows.sizes.shape[0])
    expert = jnp.repeat(numbers, rows.sizes, total_repeat_length=row.shape[0])

    def product(row: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = lax.ragged_dot(row, weight, rows.sizes)
        return y if bias is None else y + bias[expert]

    gate = product(row, weights.gate, weights.gate_bias)
    up = product(row, weights.up, weights.up_bias)
    return _added(
        product(_inner(act, gate, up), weights.down, weights.down_bias), rows, rows.place, share
    )


def _added(y: jax.Array, rows: Rows, place: jax.Array, share: jax.Array | None = None) -> jax.Array:
    """[r, d]: the sum of the rows of y [m, d] at place [r, c], times their share [r, c]."""
    someone = place < jnp.sum(rows.sizes)
    total = None
    for i in range(place.shape[1]):
        term = jnp.where(someone[:, i, None], jnp.take(y, place[:, i], axis=0, mode="clip"), 0)
        term = term if share is None else term * share[:, i, None].astype(y.dtype)
        total = term if total is None else total + term
    return jnp.zeros((place.shape[0], y.shape[1]), y.dtype) if total is None else total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(act: Act, x: jax.Array, weights: Weights, share: jax.Array, rows: Rows) -> jax.Array:
    return _forward(act, x, weights, share, rows)[0]


def _forward(act: Act, x: jax.Array, weights: Weights, share: jax.Array, rows: Rows):
    source = _with_room(rows)
    room = source.shape[0]
    empty = jnp.zeros((room, weights.gate.shape[2]), x.dtype)

    def piece(carry: Any, mine: Weights, span: _Span) -> Any:
        row = _taken(x, source, span)
        gate = _plus(row @ mine.gate, mine.gate_bias)
        up = _plus(row @ mine.up, mine.up_bias)
        out = _plus(_inner(act, gate, up) @ mine.down, mine.down_bias)
        return tuple(_put(a, b, span) for a, b in zip(carry, (gate, up, out), strict=True))

    start = empty, empty, jnp.zeros((room, weights.down.shape[2]), x.dtype)
    gates, ups, y = _by_expert(start, weights, rows, piece)
    return _added(y, rows, rows.place, share), (x, weights, share, rows, gates, ups)


def _backward(act: Act, residuals: Any, d_out: jax.Array):
    x, weights, share, rows, gates, ups = residuals
    source = _with_room(rows)
    room, (n, k) = source.shape[0], rows.place.shape
    flat = rows.place.reshape(-1)
    # Of every row: the output it is added to, and its share of it.
    target = jnp.zeros(room, jnp.int32).at[flat].set(jnp.arange(n * k, dtype=jnp.int32) // k)
    shares = jnp.zeros((room, 1), jnp.float32).at[flat, 0].set(share.reshape(-1))

    def piece(carry: Any, mine: Weights, span: _Span) -> Any:
        d_rows, d_shares, d_weights = carry
        gate, up, mixed = (_cut(a, span) for a in (gates, ups, shares))
        row, d_y = _taken(x, source, span), _taken(d_out, target, span)
        inner, pull = jax.vjp(act, *_wide(gate, up))
        d_inner = _by_columns(d_y, mine.down, jnp.float32)
        d_share = _row_dot(d_inner, inner)
        if mine.down_bias is not None:
            d_share += _row_dot(*_wide(d_y, mine.down_bias))
        d_gate, d_up = (d.astype(x.dtype) for d in pull(d_inner * mixed))
        d_row = _by_columns(d_gate, mine.gate) + _by_columns(d_up, mine.up)
        lefts = _contracted(row, span), _contracted(inner.astype(x.dtype), span)
        added = _weight_gradients(weights, span, lefts, (d_gate, d_up, d_y * mixed.astype(x.dtype)))
        return (
            _put(d_rows, d_row, span),
            _put(d_shares, d_share, span),
            jax.tree.map(functools.partial(_set, span.expert), d_weights, added),
        )

    start = jnp.zeros((room, x.shape[1]), x.dtype), jnp.zeros((room, 1), jnp.float32)
    begin = *start, jax.tree.map(jnp.zeros_like, weights)
    d_rows, d_shares, d_weights = _by_expert(begin, weights, rows, piece)
    d_x = _added(d_rows, rows, rows.place.reshape(x.shape[0], -1))
    someone = rows.place < jnp.sum(rows.sizes)
    return d_x, d_weights, jnp.where(someone, d_shares[rows.place, 0], 0), None


_experts.defvjp(_forward, _backward)


class _Span(NamedTuple):
    """Rows from `at` on, `size` of them, of which the first `own` are those of one expert."""

    expert: jax.Array
    at: jax.Array
    own: jax.Array
    size: int


def _weight_gradients(
    weights: Weights, span: _Span, lefts: tuple[jax.Array, jax.Array], rights: tuple[jax.Array, ...]
) -> Weights:
    """Of one expert, from what goes into its first and last products, transposed, and the gradients
    of what comes out."""
    row, inner = lefts
    matrices = [left @ right for left, right in zip((row, row, inner), rights, strict=True)]
    mine = (jnp.arange(span.size) < span.own)[:, None]
    biases = [
        None if bias is None else jnp.sum(right, 0, where=mine)
        for bias, right in zip(weights[3:], rights, strict=True)
    ]
    return Weights(*matrices, *biases)


def _by_expert[T](carry: T, weights: Weights, rows: Rows, one: Callable[..., T]) -> T:
    """`one(carry, the expert's weights, span)` for every expert that has rows, in order. A span may
    reach into the next expert's rows, whose own comes later."""
    starts = jnp.cumsum(rows.sizes) - rows.sizes
    order = jnp.argsort(rows.sizes == 0, stable=True)
    sizes = _sizes(rows)

    def body(i: jax.Array, carry: T) -> T:
        expert = order[i]
        at, count = starts[expert], rows.sizes[expert]
        mine = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, expert, keepdims=False), weights)

        def of(size: int) -> Callable[[T], T]:
            return lambda carry: one(carry, mine, _Span(expert, at, count, size))

        place = jnp.searchsorted(jnp.asarray(sizes), count)
        return lax.switch(place, [of(size) for size in sizes], carry)

    return lax.fori_loop(0, jnp.sum(rows.sizes > 0), body, carry)


def _sizes(rows: Rows) -> list[int]:
    """How many rows are multiplied at once: of these, the next that all of an expert's fit in."""
    count = rows.source.shape[0]
    fair = -(-count // rows.sizes.shape[0])
    step = max(_LEAST_STEP, fair // _STEPS // _SMALL[0] * _SMALL[0])
    sizes: list[int] = list(_SMALL)
    while sizes[-1] < count:
        last = sizes[-1]
        sizes.append(last // step * step + step if last < _SHARES * fair else 2 * last)
    most = -(-count // _SMALL[0]) * _SMALL[0]
    return sorted({min(size, most) for size in sizes})


def _with_room(rows: Rows) -> jax.Array:
    """The sources, and some behind them: so far beyond its own rows a span can reach."""
    sizes = [0, *_sizes(rows)]
    return jnp.pad(rows.source, (0, max(b - a for a, b in itertools.pairwise(sizes))))


def _taken(x: jax.Array, index: jax.Array, span: _Span) -> jax.Array:
    return jnp.take(x, _cut(index, span), axis=0, mode="clip")


def _cut(x: jax.Array, span: _Span) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, span.at, span.size)


def _put(whole: jax.Array, part: jax.Array, span: _Span) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, part, span.at, 0)


def _set(expert: jax.Array, whole: jax.Array, part: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(whole, part, expert, 0)


def _contracted(rows: jax.Array, span: _Span) -> jax.Array:
    """The expert's rows, the others as zero, transposed."""
    mine = (jnp.arange(span.size) < span.own)[:, None]
    return _transposed(jnp.where(mine, rows, 0))


def _transposed(x: jax.Array) -> jax.Array:
    """By blocks, which XLA copies several times faster."""
    (m, n), (a, b) = x.shape, (math.gcd(size, 32) for size in x.shape)
    blocks = lax.optimization_barrier(x.reshape(m // a, a, n // b, b))
    return lax.optimization_barrier(jnp.transpose(blocks, (2, 3, 0, 1)).reshape(n, m))


def _plus(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias


def _inner(act: Act, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Computed in float32 and rounded once."""
    return act(*_wide(gate, up)).astype(gate.dtype)


def _wide(*arrays: jax.Array) -> list[jax.Array]:
    return [array.astype(jnp.float32) for array in arrays]


def _by_columns(rows: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """[m, f] x [d, f] -> [m, d], the weight as it lies."""
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(rows, weight, dims, preferred_element_type=dtype)


def _row_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums of products over the last dim, [m, 1]."""
    return jnp.sum(a * b, axis=1, keepdims=True)
