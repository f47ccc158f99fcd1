"""What an engine keeps of one sequence, taken out whole: to be sent to another engine."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ropewalk.serve.engine import Engine
from ropewalk.serve.programs import State


def take(
    engine: Engine, state: State, tables: Sequence[Sequence[int]], carry: Any = None
) -> list[Any]:
    """Of every layer: buffers [blocks, k, size, h] of the pages in `tables`, or what a recurrent
    one knows (`carry`, of a Prefix). The State stays valid."""
    rest = iter(carry or ())
    return [
        next(rest)
        if group is None
        else jax.tree.map(lambda pool, g=group: pool[np.asarray(tables[g])], cache)
        for group, cache in zip(engine.groups, state.caches, strict=True)
    ]


def put(
    engine: Engine, state: State, kept: Sequence[Any], tables: Sequence[Sequence[int]]
) -> State:
    """Lays what `take` took, here or in another engine of the same sizes, on other pages."""

    def laid(group: int | None, cache: Any, one: Any) -> Any:
        if group is None:
            return cache
        pages = np.asarray(tables[group])
        return jax.tree.map(lambda pool, x: pool.at[pages].set(x), cache, one)

    each = zip(engine.groups, state.caches, kept, strict=True)
    return dataclasses.replace(state, caches=[laid(*one) for one in each])


def carried(engine: Engine, kept: Sequence[Any]) -> list[Any]:
    """Of what `take` took, what recurrent layers know."""
    return [one for group, one in zip(engine.groups, kept, strict=True) if group is None]


def stacked(engine: Engine, kept: Sequence[Any]) -> dict[str, Any]:
    """What `take` took with one array a leaf for all layers of a group, [layers, ...], however the
    layers are run."""
    groups: dict[str, list[Any]] = {str(group): [] for group in engine.groups}
    for group, one in zip(engine.groups, kept, strict=True):
        groups[str(group)].append(one)
    return {name: jax.tree.map(lambda *x: jnp.stack(x), *all_) for name, all_ in groups.items()}


def unstacked(engine: Engine, sent: dict[str, Any]) -> list[Any]:
    """The inverse of `stacked`."""
    places = {name: itertools.count() for name in sent}

    def one(group: int | None) -> Any:
        i = next(places[str(group)])
        return jax.tree.map(lambda x: x[i], sent[str(group)])

    return [one(group) for group in engine.groups]
