"""Invertible rules between the tensors of a Hugging Face checkpoint and the parameters of a model.

A family writes one tuple of `Rule`; import, export and GGUF all read it. The operations are driven
by the shape of the parameter, so a rule holds no numbers. Knows no model and no file format.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ropewalk.core.errors import ModelError
from ropewalk.core.paths import Spec

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """An invertible operation between a file's tensor and one layer's parameter of a given shape.

    `read` and `write` return views where numpy can, so that a caller who then slices touches only
    that slice of the file. A family with another arrangement defines its own Op beside its rules.
    """

    source_shape: Callable[[Shape], Shape]  # parameter shape -> shape of the tensor in the file
    read: Callable[[np.ndarray, Shape], np.ndarray]  # (tensor, parameter shape) -> parameter
    write: Callable[[np.ndarray], np.ndarray]  # parameter -> tensor


COPY = Op(lambda shape: shape, lambda tensor, shape: tensor, lambda array: array)
# [out] in the file, heads apart in ours: [n,h].
VECTOR = Op(
    lambda shape: (math.prod(shape),),
    lambda tensor, shape: tensor.reshape(shape),
    lambda array: array.reshape(-1),
)
# [out,in] in the file; [in, *out] in ours, e.g. [d,n,h].
LINEAR = Op(
    lambda shape: (math.prod(shape[1:]), shape[0]),
    lambda tensor, shape: np.moveaxis(tensor.reshape(*shape[1:], shape[0]), -1, 0),
    lambda array: np.moveaxis(array, 0, -1).reshape(math.prod(array.shape[1:]), array.shape[0]),
)
# [out,in] in the file; [*in, out] in ours, e.g. [n,h,d].
LINEAR_OUT = Op(
    lambda shape: (shape[-1], math.prod(shape[:-1])),
    lambda tensor, shape: np.moveaxis(tensor.reshape(shape[-1], *shape[:-1]), 0, -1),
    lambda array: np.moveaxis(array, -1, 0).reshape(array.shape[-1], math.prod(array.shape[:-1])),
)
# [in,out] in the file; [in, *out] in ours.
FLAT = Op(
    lambda shape: (shape[0], math.prod(shape[1:])),
    lambda tensor, shape: tensor.reshape(shape),
    lambda array: array.reshape(array.shape[0], -1),
)
# [in,out] in the file; [*in, out] in ours.
FLAT_IN = Op(
    lambda shape: (math.prod(shape[:-1]), shape[-1]),
    lambda tensor, shape: tensor.reshape(shape),
    lambda array: array.reshape(-1, array.shape[-1]),
)


@dataclasses.dataclass(frozen=True)
class Fused:
    """How a file's tensor holds several of our parameters along one of its dims: the dim is
    `groups` times a share of each, in the order of `place`.

    `groups` follows from the shape of the parameter with place 0; by default there is one group,
    and the parameters lie one after the other.
    """

    place: int
    axis: int = 0
    groups: Callable[[Shape], int] = lambda shape: 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor: its name in a checkpoint, our path, and the operation between them.

    `{i}` in `source` is the number of the layer over the whole model and `{e}` that of an expert,
    the first dim of a layer's parameter; `*` in `path` stands for the `segments.S.B` of a stack,
    e.g. `model.layers.{i}.mlp.up_proj.weight` and `layers.*.mlp.up.weight`. A rule whose path the
    model does not have (biases, an untied head) says nothing about that model.
    """

    source: str
    path: str
    op: Op = COPY
    # What a GGUF file did to the tensor beside renaming it; "rope_pairs": rotary pairs interleaved;
    # "plus_one": one added.
    gguf: str = ""
    # Where the model has no such parameter, a file may hold the tensor if it equals this source.
    tied: str = ""
    # Where several rules share a source: which share of its tensor this one's is.
    fused: Fused | None = None


@dataclasses.dataclass(frozen=True)
class Share:
    """The part `start` to `stop` of every one of `groups` along `axis` of a tensor."""

    axis: int
    groups: int
    start: int
    stop: int

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """The share [..., groups * (stop - start), ...]; a view where there is one group."""
        axis = self.axis % tensor.ndim
        lead, trail = tensor.shape[:axis], tensor.shape[axis + 1 :]
        view = tensor.reshape(*lead, self.groups, -1, *trail)
        index = (slice(None),) * (axis + 1) + (slice(self.start, self.stop),)
        return view[index].reshape(*lead, -1, *trail)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rule at work on one tensor: `read` of `source` is `parameter[index]`, of `shape`."""

    source: str
    path: str
    index: tuple[int, ...]
    shape: Shape
    op: Op
    share: Share | None = None

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter, or its part, of the file's tensor."""
        return self.op.read(tensor if self.share is None else self.share.of(tensor), self.shape)


def source_shape(entries: Sequence[Entry]) -> Shape:
    """The shape of the file's tensor that these entries, all of one source, make up."""
    first = entries[0]
    shape = first.op.source_shape(first.shape)
    if first.share is None:
        return shape
    axis = first.share.axis % len(shape)
    size = first.share.groups * max(entry.share.stop for entry in entries if entry.share)
    return (*shape[:axis], size, *shape[axis + 1 :])


def joined(entries: Sequence[Entry], parts: Sequence[np.ndarray]) -> np.ndarray:
    """The file's tensor from the parameters of its entries, in their order."""
    tensors = [entry.op.write(part) for entry, part in zip(entries, parts, strict=True)]
    share = entries[0].share
    if share is None:
        return tensors[0]
    axis = share.axis % tensors[0].ndim
    grouped = [t.reshape(*t.shape[:axis], share.groups, -1, *t.shape[axis + 1 :]) for t in tensors]
    return np.concatenate(grouped, axis=axis + 1).reshape(source_shape(entries))


def by_source(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of every tensor, those that share one in the order of their shares."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.source, []).append(entry)
    return {
        name: sorted(each, key=lambda e: e.share.start if e.share else 0)
        for name, each in found.items()
    }


def expand(rules: Iterable[Rule], table: Mapping[str, Spec]) -> list[Entry]:
    """One entry for each tensor in the checkpoint of a model with this table, ordered by rule.

    Raises ModelError when a parameter is covered by no rule, or by two.
    """
    entries: list[Entry] = []
    covered: dict[str, Rule] = {}
    places: dict[tuple[str, str], Fused] = {}
    for rule in rules:
        for path, layers in _targets(rule, table).items():
            if path in covered:
                both = f"`{covered[path].source}` and `{rule.source}`"
                raise ModelError(
                    f"parameter `{path}` is filled by two weight rules, {both}; remove one"
                )
            covered[path] = rule
            found = _entries(rule, path, table[path].shape, layers)
            entries.extend(found)
            if rule.fused is not None:
                places.update({(entry.source, path): rule.fused for entry in found})
    bare = [path for path in table if path not in covered]
    if bare:
        listed = ", ".join(f"`{path}`" for path in bare[:5])
        raise ModelError(
            f"{len(bare)} parameters have no weight rule: {listed}; add them to the family's "
            "WEIGHTS"
        )
    return _shared(entries, places)


def _entries(rule: Rule, path: str, shape: Shape, layers: range | None) -> list[Entry]:
    """The entries of one parameter: one, one a layer, or one a layer and expert."""
    each = "{e}" in rule.source
    places = [((), 0)] if layers is None else [((n,), layer) for n, layer in enumerate(layers)]
    found = []
    for index, layer in places:
        inner = shape[len(index) :]
        for e in range(inner[0]) if each else [None]:
            name = rule.source.format(i=layer, e=e)
            whole = (*index, e) if e is not None else index
            found.append(Entry(name, path, whole, shape[len(whole) :], rule.op))
    return found


def _shared(entries: list[Entry], places: Mapping[tuple[str, str], Fused]) -> list[Entry]:
    """The entries with their shares, where several make up one tensor."""
    if not places:
        return entries
    fused: dict[str, list[Entry]] = {}
    for entry in entries:
        if (entry.source, entry.path) in places:
            fused.setdefault(entry.source, []).append(entry)
    shares: dict[tuple[str, str], Share] = {}
    for source, each in fused.items():
        each = sorted(each, key=lambda e: places[source, e.path].place)
        rule = places[source, each[0].path]
        groups, start = rule.groups(each[0].shape), 0
        for entry in each:
            stop = start + entry.op.source_shape(entry.shape)[rule.axis] // groups
            shares[source, entry.path] = Share(rule.axis, groups, start, stop)
            start = stop
    return [
        dataclasses.replace(entry, share=shares.get((entry.source, entry.path)))
        for entry in entries
    ]


def layer_numbers(stack: str, table: Mapping[str, Spec]) -> dict[tuple[int, int], range]:
    """For each (segment, block) of a stack: the model-wide layer number of every repeat.

    Blocks of a unit follow one another, units repeat, segments come in order.
    """
    pattern = re.compile(rf"{re.escape(stack)}\.segments\.(\d+)\.(\d+)\.")
    repeats: dict[int, int] = {}
    units: dict[int, set[int]] = {}
    for path, spec in table.items():
        if found := pattern.match(path):
            segment, block = int(found[1]), int(found[2])
            units.setdefault(segment, set()).add(block)
            if repeats.setdefault(segment, spec.shape[0]) != spec.shape[0]:
                raise ModelError(
                    f"parameter `{path}` stacks {spec.shape[0]} layers, its segment "
                    f"{repeats[segment]}"
                )
    numbers: dict[tuple[int, int], range] = {}
    first = 0
    for segment in sorted(units):
        end = first + len(units[segment]) * repeats[segment]
        for block in sorted(units[segment]):
            numbers[segment, block] = range(first + block, end, len(units[segment]))
        first = end
    return numbers


def _targets(rule: Rule, table: Mapping[str, Spec]) -> dict[str, range | None]:
    """The paths a rule fills, each with its layer numbers; None where it is not stacked."""
    stack, star, _ = rule.path.partition(".*.")
    if not star:
        return {rule.path: None} if rule.path in table else {}
    pattern = re.compile(re.escape(rule.path).replace(r"\*", r"segments\.(\d+)\.(\d+)"))
    numbers = layer_numbers(stack, table)
    found = ((path, pattern.fullmatch(path)) for path in table)
    return {path: numbers[int(match[1]), int(match[2])] for path, match in found if match}
