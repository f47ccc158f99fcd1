"""Invertible rules between the tensors of a Hugging Face checkpoint and the parameters of a model.

A family writes one tuple of `Rule`; import, export and GGUF all read it. The operations are driven
by the shape of the parameter, so a rule holds no numbers. Knows no model and no file format.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from ropewalk.core.errors import ModelError
from ropewalk.core.paths import Spec

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """An invertible operation between a file's tensor and one layer's parameter of a given shape.

    `read` and `write` return views where numpy can, so that a caller who then slices touches only
    that slice of the file. A family with another arrangement (interleaved heads, say) defines its
    own Op beside its rules; one with another numbering (experts) extends `expand`, the only place
    where a rule becomes entries.
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


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor: its name in a checkpoint, our path, and the operation between them.

    `{i}` in `source` is the number of the layer over the whole model; `*` in `path` stands for the
    `segments.S.B` of a stack, e.g. `model.layers.{i}.mlp.up_proj.weight` and
    `layers.*.mlp.up.weight`. A rule whose path the model does not have (biases, an untied head)
    says nothing about that model.
    """

    source: str
    path: str
    op: Op = COPY
    # What a GGUF file did to the tensor beside renaming it; "rope_pairs": rotary pairs interleaved;
    # "unknown": what else such files say is not read yet, so they are refused.
    gguf: str = ""
    # Where the model has no such parameter, a file may hold the tensor if it equals this source.
    tied: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rule at work on one tensor: `op.read` of `source` is `parameter[index]`, of `shape`."""

    source: str
    path: str
    index: tuple[int, ...]
    shape: Shape
    op: Op


def expand(rules: Iterable[Rule], table: Mapping[str, Spec]) -> list[Entry]:
    """One entry for each tensor in the checkpoint of a model with this table, ordered by rule.

    Raises ModelError when a parameter is covered by no rule, or by two.
    """
    entries: list[Entry] = []
    covered: dict[str, Rule] = {}
    for rule in rules:
        for path, layers in _targets(rule, table).items():
            if path in covered:
                both = f"`{covered[path].source}` and `{rule.source}`"
                raise ModelError(
                    f"parameter `{path}` is filled by two weight rules, {both}; remove one"
                )
            covered[path] = rule
            shape = table[path].shape
            if layers is None:
                entries.append(Entry(rule.source, path, (), shape, rule.op))
                continue
            entries.extend(
                Entry(rule.source.format(i=layer), path, (repeat,), shape[1:], rule.op)
                for repeat, layer in enumerate(layers)
            )
    bare = [path for path in table if path not in covered]
    if bare:
        listed = ", ".join(f"`{path}`" for path in bare[:5])
        raise ModelError(
            f"{len(bare)} parameters have no weight rule: {listed}; add them to the family's "
            "WEIGHTS"
        )
    return entries


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
