"""Weights in and out by a family's rules; host memory peaks at the model plus one tensor.

Knows neither families nor file formats: a `Reader` gives tensors by name, a `Tensor` is one that a
writer asks for.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ropewalk.checkpoint.readers import Reader, usual
from ropewalk.core import dtypes
from ropewalk.core.errors import ModelError
from ropewalk.core.paths import Spec, matches
from ropewalk.core.weights import Entry, Rule, by_source, expand, joined, source_shape

# Buffers that older checkpoints carry and that follow from the config.
IGNORED = ("*.rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias")

Window = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor on its way out: its values are made when `value` is called."""

    name: str
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]
    dtype: np.dtype | None = None
    """its own, whatever that of the others"""

    def stored_as(self, dtype: np.dtype) -> np.dtype:
        """Its dtype in a file of this dtype."""
        return dtype if self.dtype is None else self.dtype


def load_into(
    reader: Reader,
    rules: Sequence[Rule],
    table: Mapping[str, Spec],
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    dtype: str | None = None,
    unused: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Every parameter of `table` by path, filled from `reader`.

    `shardings` places them (default: the first device). `dtype` (float32, bfloat16, float16)
    replaces the dtype that the table names, of what is trained; tensors that match `unused` may be
    there. Each device's part is filled layer by layer in its own buffer, so a process reads and
    holds only what its devices need.
    Raises ModelError when tensors are missing, unexpected or misshapen, or when values overflow the
    dtype.
    """
    entries = expand(rules, table)
    reader = usual(reader, [entry.source for entry in entries])
    check(reader, rules, entries, unused)
    by_path: dict[str, list[Entry]] = {path: [] for path in table}
    for entry in entries:
        by_path[entry.path].append(entry)
    params: dict[str, jax.Array] = {}
    for path, spec in table.items():
        kind = np.dtype(spec.dtype if dtype is None else spec.held_in(dtypes.parse(dtype)))
        sharding = shardings[path] if shardings is not None else None
        params[path] = _parameter(reader, by_path[path], spec.shape, kind, sharding)
    return params


def check(
    reader: Reader, rules: Iterable[Rule], entries: Iterable[Entry], unused: Sequence[str] = ()
) -> None:
    """Raises ModelError, first five differences listed, unless the reader has these entries."""
    wanted = {name: source_shape(each) for name, each in by_source(entries).items()}
    tied = {rule.source: rule.tied for rule in rules if rule.tied and rule.source not in wanted}
    missing = [
        f"{name} {list(shape)}" for name, shape in wanted.items() if name not in reader.shapes
    ]
    unexpected = [
        f"{name} {list(shape)}"
        for name, shape in reader.shapes.items()
        if name not in wanted and name not in tied and not matches(name, (*IGNORED, *unused))
    ]
    misshapen = [
        f"{name} (file {list(reader.shapes[name])}, model {list(shape)})"
        for name, shape in wanted.items()
        if name in reader.shapes and tuple(reader.shapes[name]) != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    found = [f"{len(names)} {kind}: {_first(names)}" for kind, names in problems.items() if names]
    if found:
        advice = "check model_type, hidden_size, num_hidden_layers, vocab_size and "
        advice += "tie_word_embeddings in the config, which does not describe these weights"
        raise ModelError(
            f"{reader.place}: tensors differ from the model's; {'; '.join(found)}; {advice}"
        )
    for source, twin in tied.items():
        if source in reader.shapes and not _equal(reader, source, twin):
            raise ModelError(
                f"{reader.place}: `{source}` {list(reader.shapes[source])} differs from `{twin}` "
                f"{list(reader.shapes[twin])} though the config ties them; set "
                "tie_word_embeddings to false to use both"
            )


def export(
    params: Mapping[str, Any], rules: Iterable[Rule], table: Mapping[str, Spec]
) -> list[Tensor]:
    """The tensors of a checkpoint of this model, each made from one layer when asked for.

    `params` holds jax or numpy arrays by path. Raises ModelError when one is missing or misshapen.
    """
    entries = expand(rules, table)
    shapes = {path: tuple(params[path].shape) if path in params else None for path in table}
    wrong = [
        f"{path} (have {shapes[path]}, model {spec.shape})"
        for path, spec in table.items()
        if shapes[path] != spec.shape
    ]
    if wrong:
        raise ModelError(f"{len(wrong)} parameters are missing or misshapen: {_first(wrong)}")

    def values(each: list[Entry]) -> np.ndarray:
        return joined(each, [_layer(params[entry.path], entry.index) for entry in each])

    return [
        Tensor(
            name,
            source_shape(each),
            functools.partial(values, each),
            table[each[0].path].held_in(None),
        )
        for name, each in by_source(entries).items()
    ]


def cast(source: np.ndarray, target: np.ndarray, name: str) -> None:
    """Copies `source` into `target` of the same shape.

    Raises ModelError when a finite value becomes infinite.
    """
    with np.errstate(over="ignore"):
        target[...] = source
    if _largest(target.dtype) < _largest(source.dtype):
        lost = int(np.isinf(target).sum() - np.isinf(source).sum())
        if lost:
            largest = float(np.max(np.abs(source), where=np.isfinite(source), initial=0))
            raise ModelError(
                f"tensor `{name}`: {lost} values up to {largest:.4g} overflow {target.dtype}, "
                f"which ends at {_largest(target.dtype):.4g}; use dtype bfloat16 or float32"
            )


def _parameter(
    reader: Reader,
    entries: list[Entry],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    whole = tuple(slice(0, size) for size in shape)
    if sharding is None:
        return jax.device_put(_filled(reader, entries, dtype, whole))

    def part(index: Window | None) -> np.ndarray:
        pieces = zip(index or whole, shape, strict=True)
        bounds = [piece.indices(size) for piece, size in pieces]
        window = tuple(slice(start, stop) for start, stop, _ in bounds)
        return _filled(reader, entries, dtype, window)

    if reader.lazy:
        return jax.make_array_from_callback(shape, sharding, part)
    full = part(whole)  # decoded once, not once a device
    return jax.make_array_from_callback(shape, sharding, lambda index: full[index or whole])


def _filled(reader: Reader, entries: list[Entry], dtype: np.dtype, window: Window) -> np.ndarray:
    """The part of a stacked parameter that lies in `window`; layers outside it are not read."""
    out = _aligned(tuple(piece.stop - piece.start for piece in window), dtype)
    for entry in entries:
        depth = len(entry.index)
        pairs = list(zip(entry.index, window[:depth], strict=True))
        if all(piece.start <= i < piece.stop for i, piece in pairs):
            place = tuple(i - piece.start for i, piece in pairs)
            part = entry.read(reader.read(entry.source))[window[depth:]]
            cast(part, out[(*place, ...)], entry.source)
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a 64-byte boundary, which jax on CPU takes without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _layer(array: Any, index: tuple[int, ...]) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array[index]
    # The index is an operand: one compile a shape, not one a layer.
    inner = array.shape[len(index) :]
    start = (*index, *(0 for _ in inner))
    part = jax.lax.dynamic_slice(array, start, (*(1 for _ in index), *inner))
    return np.asarray(part).reshape(inner)


def _equal(reader: Reader, left: str, right: str) -> bool:
    if tuple(reader.shapes[left]) != tuple(reader.shapes[right]):
        return False
    return np.array_equal(reader.read(left), reader.read(right), equal_nan=True)


def _largest(dtype: np.dtype) -> float:
    return float(jnp.finfo(dtype).max)


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
