"""The device mesh: how many devices lie along each axis, -1 for the rest of them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from ropewalk.core.errors import LayoutError

AXES = ("replica", "data", "stage", "fsdp", "context", "tensor", "expert")


def build(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices with the named sizes; an axis of size -1 takes what the others leave.

    Axes that are not named have size 1. Raises LayoutError when the product is not the number of
    devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _filled(sizes, len(devices))
    product = math.prod(sizes.values())
    if product != len(devices):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1"
        raise LayoutError(
            f"the mesh {shape} needs {product} devices and {len(devices)} are here; "
            f"change layout.mesh (one axis may be -1: the rest)"
        )
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def default_sizes(rules: str, devices: int) -> dict[str, int]:
    """The mesh a rule table is meant for: pairs of devices along `tensor` or `expert`, the rest
    along `fsdp`."""
    if rules == "tensor":
        return {"tensor": -1}
    second = rules.removeprefix("fsdp_")
    pairs = {} if second == rules else {second: math.gcd(devices, 2)}
    return {"fsdp": -1, **pairs}


def _filled(sizes: dict[str, int], devices: int) -> dict[str, int]:
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise LayoutError(f"layout.mesh has no axis `{unknown[0]}`; the axes are {', '.join(AXES)}")
    wrong = [f"{name}={size}" for name, size in sizes.items() if size < 1 and size != -1]
    rest = [name for name, size in sizes.items() if size == -1]
    if wrong or len(rest) > 1:
        raise LayoutError(
            f"layout.mesh: {', '.join(wrong or rest)}: a size is a positive number, and one axis "
            "at most is -1 (the rest)"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    full = {name: sizes.get(name, 1) for name in AXES}
    if rest:
        full[rest[0]] = max(1, devices // known)
    return full
