"""Depth: a stack is segments, a segment is a unit of blocks repeated R times with its weights
stacked on a leading axis.

`run` (scan or unroll) and `remat` say how the same weights are run; they change neither the
checkpoint nor the mathematics.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.parallel.axes import shard
from ropewalk.parallel.remat import Remat, wrap

Unit = Sequence[Callable[[nnx.Rngs], nnx.Module]]


class Stack(nnx.Module):
    """Blocks one after the other; each is called as `block(x, ctx, cache) -> (x, cache, aux)`."""

    def __init__(self, plan: Sequence[tuple[Unit, int]], *, rngs: nnx.Rngs):
        self.run = "scan"
        self.remat: Remat = "none"
        self.segments = nnx.List([_segment(unit, repeats, rngs) for unit, repeats in plan])

    def __call__(
        self, x: jax.Array, ctx: Any, caches: Sequence[Any] | None = None
    ) -> tuple[jax.Array, list[Any] | None, dict[str, jax.Array]]:
        """x [b, t, d] -> ([b, t, d], one cache a layer or None, what the layers report, stacked in
        layer order).

        With caches the stack always runs unrolled: a cache passed through a scan is copied whole.
        """
        remaining = None if caches is None else list(caches)
        new_caches: list[Any] = []

        def call(x: jax.Array, block: Any, ctx: Any, cache: Any) -> Any:
            return block(shard(x, "batch", "time", "hidden"), ctx, cache)

        # Equal layers are traced once, and once for every program: each may be under other rules.
        call = jax.jit(wrap(call, self.remat, in_scan=False))
        reports: list[list[dict[str, jax.Array]]] = []
        for segment in self.segments:
            if self.run == "scan" and remaining is None and repeats(segment) > 1:
                x, report = self._scan(segment, x, ctx)
            else:
                x, written, report = self._unroll(call, segment, x, ctx, remaining)
                new_caches += written
            reports.append(report)
        return x, (None if caches is None else new_caches), _gather(reports)

    def unstacked(self) -> "Stack":
        """The same blocks with one segment a repeat, so that a decoding step reads each weight
        where it lies."""
        single = [
            nnx.List([jax.tree.map(lambda p, i=i: p[i : i + 1], block) for block in segment])
            for segment in self.segments
            for i in range(repeats(segment))
        ]
        self.segments = nnx.List(single)
        self.run = "unroll"
        return self

    def layer(self, index: int) -> nnx.Module:
        """The block of one layer, counted through all segments."""
        for segment in self.segments:
            layers = repeats(segment) * len(segment)
            if index < layers:
                return _repeat(segment[index % len(segment)], index // len(segment))
            index -= layers
        raise IndexError(index)

    def blocks(self) -> Iterator[Any]:
        """The block of every layer in order, its weights still stacked."""
        for segment in self.segments:
            for _ in range(repeats(segment)):
                yield from segment

    def _scan(self, segment, x, ctx):
        def body(x, blocks, ctx):
            reports = []
            for block in blocks:
                x, _, report = block(shard(x, "batch", "time", "hidden"), ctx)
                reports.append(report)
            return x, reports

        body = wrap(body, self.remat, in_scan=True)
        x, reports = jax.lax.scan(lambda x, blocks: body(x, blocks, ctx), x, list(segment))
        return x, reports

    def _unroll(self, call, segment, x, ctx, caches):
        written, reports = [], [[] for _ in segment]
        for i in range(repeats(segment)):
            for place, block in enumerate(segment):
                cache = None if caches is None else caches.pop(0)
                x, cache, report = call(x, _repeat(block, i), ctx, cache)
                reports[place].append(report)
                written.append(cache)
        return (
            x,
            written,
            [
                jax.tree.map(lambda *each: jnp.stack(each), *reports[place])
                for place in range(len(segment))
            ],
        )


def pattern[K](kinds: Sequence[K], make: Callable[[K, nnx.Rngs], nnx.Module]) -> list[Any]:
    """The plan of layers of these kinds in order: from the first layer on, always the unit whose
    repetitions reach farthest, the shortest of them."""
    plan, first = [], 0
    while first < len(kinds):
        rest = kinds[first:]
        reach = {n: n * _repetitions(rest, n) for n in range(1, max(1, len(rest) // 2) + 1)}
        repeated = {n for n, end in reach.items() if end > n} or {1}
        size = max(repeated, key=lambda n: (reach[n], -n))
        plan.append(([functools.partial(make, kind) for kind in rest[:size]], reach[size] // size))
        first += reach[size]
    return plan


def _repetitions(kinds: Sequence[Any], size: int) -> int:
    """How often the first `size` kinds stand one after the other."""
    whole = len(kinds) // size
    return next(
        (n for n in range(1, whole) if kinds[n * size : (n + 1) * size] != kinds[:size]), whole
    )


def repeats(segment: Sequence[nnx.Module]) -> int:
    """How many times a segment's unit stands one after the other."""
    return jax.tree.leaves(segment[0])[0].shape[0]


def depth(stack: Stack) -> int:
    """The number of layers."""
    return sum(repeats(segment) * len(segment) for segment in stack.segments)


def _segment(unit: Unit, repeats: int, rngs: nnx.Rngs) -> nnx.List:
    def stacked(make):
        keys = jax.random.split(rngs.params(), repeats)
        return jax.vmap(lambda key: make(nnx.Rngs(key)))(keys)

    return nnx.List([stacked(make) for make in unit])


def _repeat(block: nnx.Module, i: int) -> nnx.Module:
    """One repeat of a stacked block; of a single one, its axis is dropped for free."""
    return jax.tree.map(lambda p: p.reshape(p.shape[1:]) if p.shape[0] == 1 else p[i], block)


def _gather(reports: list[list[dict[str, jax.Array]]]) -> dict[str, jax.Array]:
    """Per segment and place in its unit, name -> [R, ...]; out comes name -> [layers that report
    it, ...]."""
    gathered: dict[str, list[jax.Array]] = {}
    for segment in reports:
        for name in {name: None for report in segment for name in report}:
            values = jnp.stack([report[name] for report in segment if name in report], axis=1)
            gathered.setdefault(name, []).append(values.reshape(-1, *values.shape[2:]))
    return {name: jnp.concatenate(values) for name, values in gathered.items()}
