"""The bias by which routers prefer experts that work too little: moved after every update by how
evenly they worked, not by a gradient. arXiv:2408.15664"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ropewalk.core.errors import ConfigError
from ropewalk.core.paths import Spec
from ropewalk.core.weights import layer_numbers

Arrays = dict[str, jax.Array]
Update = Callable[[Arrays, Arrays], Arrays]


def build(rate: float, table: Mapping[str, Spec]) -> Update:
    """(frozen weights by path, reports) -> frozen weights, in which the bias of every expert that
    was chosen less often than the mean in `router_load` [l, e] is `rate` higher, of others lower.

    Raises ConfigError where there is a rate and no bias in the table.
    """
    paths = [p for p, spec in table.items() if not spec.trained and spec.axes[-1] == "experts"]
    if rate and not paths:
        raise ConfigError(
            f"optimizer.router_bias_rate = {rate} and no router of the model has a selection bias; "
            "remove it, or use objective.balance"
        )
    numbers = layer_numbers("layers", table)
    layers = {path: numbers[_block(path)] for path in paths}
    routed = sorted(number for each in layers.values() for number in each)
    places = {path: np.searchsorted(routed, list(each)) for path, each in layers.items()}

    def update(frozen: Arrays, reports: Arrays) -> Arrays:
        if not rate:
            return frozen
        load = reports["router_load"]
        step = rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
        moved = {
            path: frozen[path] + step[place].astype(frozen[path].dtype)
            for path, place in places.items()
        }
        return {**frozen, **moved}

    return update


def _block(path: str) -> tuple[int, int]:
    """Segment and place in its unit, of `layers.segments.S.B....`."""
    segment, place = path.split(".")[2:4]
    return int(segment), int(place)
