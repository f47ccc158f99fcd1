"""Logical axis names, and the one place where they become shardings.

A parameter or activation names its dimensions; a rule table maps names to mesh axes. No code
guesses from a path.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ropewalk.core.errors import LayoutError
from ropewalk.core.paths import Spec
from ropewalk.parallel.rules import Rules

# What each dimension of a parameter may be called.
PARAMETER_AXES = {
    "layers": "repeats of a stacked segment",
    "vocab": "token ids",
    "embed": "hidden features, as a parameter holds them",
    "mlp": "inner features of the MLP",
    "heads": "query heads",
    "kv_heads": "key and value heads",
    "head_dim": "features of one head",
    "experts": "experts of a layer",
    "kernel": "tokens that a short convolution sees",
    "latent": "compressed features between two products",
    "positions": "learned positions",
}
# What each dimension of an activation may be called, beside the feature names above.
ACTIVATION_AXES = {
    "batch": "sequences",
    "time": "tokens of a sequence",
    "hidden": "hidden features, as an activation holds them",
}

Kind = Literal["matrix", "embedding", "vector"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """A device mesh and the rules by which logical axes spread over it."""

    mesh: Mesh
    rules: Rules
    asked: str = ""
    """the option that asked for it, as errors name it; without one, a recipe's layout"""

    @property
    def platform(self) -> str:
        """The kind of device the program is for: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform


_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar(
    "placement", default=None
)


def kind(spec: Spec) -> Kind:
    """What a parameter is to an optimizer: a table over the vocabulary or positions, a product's
    matrix, or a scale or bias."""
    names = [axis for axis in spec.axes if axis != "layers"]
    axes = set(names[1:] if names[:1] == ["experts"] else names)  # of one expert
    if axes & {"vocab", "positions"}:
        return "embedding"
    return "matrix" if axes & {"embed", "latent"} and len(axes) > 1 else "vector"


@contextlib.contextmanager
def placed(placement: Placement | None) -> Iterator[None]:
    """While a program is traced: `shard` constrains by this mesh and these rules, `platform`
    answers for it."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def platform() -> str:
    """The platform of the program being traced: that of the mesh, or of the default device without
    one."""
    placement = _placement.get()
    return placement.platform if placement else jax.default_backend()


def spread() -> Placement | None:
    """Where the program being traced is placed, if that is more than one device."""
    placement = _placement.get()
    return placement if placement and placement.mesh.size > 1 else None


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """While the part of a program that each device runs by itself is traced: `shard` constrains
    nothing, `platform` answers as around it."""
    placement = _placement.get()
    if placement is not None:
        first = placement.mesh.devices[(slice(0, 1),) * placement.mesh.devices.ndim]
        placement = Placement(Mesh(first, placement.mesh.axis_names), placement.rules)
    with placed(placement):
        yield


def partition(shape: Sequence[int], axes: Sequence[str | None], on: Placement) -> PartitionSpec:
    """How an activation of a shape lies as its logical axes say.

    A dimension that its mesh axes do not divide stays whole (one sequence cannot be split over
    eight devices).
    """
    return _partition(axes, on, fits=lambda dim, ways: shape[dim] % ways == 0)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to lie as its logical axes say (`partition`); without a mesh it is
    returned as it came."""
    placement = spread()
    if placement is None:
        return x
    place = NamedSharding(placement.mesh, partition(x.shape, axes, placement))
    return jax.lax.with_sharding_constraint(x, place)


def shardings(table: Mapping[str, Spec], placement: Placement) -> dict[str, NamedSharding]:
    """The sharding of every parameter in a table of path -> Spec.

    Raises LayoutError, with path and both numbers, where a dimension does not divide over its mesh
    axes.
    """
    return {path: _parameter_sharding(path, spec, placement) for path, spec in table.items()}


def batch_sharding(placement: Placement, batch: int) -> NamedSharding:
    """The sharding of a [b, t] array of `batch` sequences. Raises LayoutError when they do not
    divide."""
    spec = _partition(("batch", "time"), placement, fits=lambda dim, ways: True)
    names = next(iter(spec), None)
    ways = _ways(names, placement.mesh)
    if batch % ways:
        raise LayoutError(
            f"batch of {batch} sequences does not divide over {ways} devices (mesh axes "
            f"{spec[0]}); "
            f"set data.batch_size to a multiple of {ways}, or change layout.mesh"
        )
    return NamedSharding(placement.mesh, spec)


def replicated(placement: Placement) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(placement.mesh, PartitionSpec())


def _parameter_sharding(path: str, spec: Spec, placement: Placement) -> NamedSharding:
    partition = _partition(spec.axes, placement, fits=lambda dim, ways: True)
    for dim, names in enumerate(partition):
        ways = _ways(names, placement.mesh)
        size = spec.shape[dim]
        if size % ways:
            more = f"set model.vocab_size to {size + -size % ways} (ids that no text has), or "
            change = (
                f"{more if spec.axes[dim] == 'vocab' else ''}change layout.mesh or layout.rules"
            )
            if placement.asked:
                change = f"change {placement.asked}"
            raise LayoutError(
                f"parameter `{path}` has {size} `{spec.axes[dim]}`, which does not divide over the "
                f"{ways} devices of mesh axis {names}; {change}"
            )
    return NamedSharding(placement.mesh, partition)


def _partition(axes, placement: Placement, fits) -> PartitionSpec:
    """Logical axes -> PartitionSpec: a mesh axis serves the first dimension that asks for it."""
    used: set[str] = set()
    parts = []
    for dim, axis in enumerate(axes):
        names = tuple(
            name
            for name in placement.rules.get(axis, ())
            if name not in used and placement.mesh.shape.get(name, 1) > 1
        )
        if not names or not fits(dim, _ways(names, placement.mesh)):
            parts.append(None)
            continue
        used.update(names)
        parts.append(names[0] if len(names) == 1 else names)
    return PartitionSpec(*parts)


def _ways(names: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    if names is None:
        return 1
    ways = 1
    for name in (names,) if isinstance(names, str) else names:
        ways *= mesh.shape[name]
    return ways
