"""Safetensors files: a strict reader of one file or a sharded directory, and a streaming writer.

Every header is checked whole before a tensor is touched; tensors are memory-mapped, so slicing one
reads only the slice. Knows no config and no model.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from ropewalk.checkpoint.weights import Tensor, cast
from ropewalk.core import dtypes
from ropewalk.core.errors import ModelError
from ropewalk.core.storage import read_json, regular_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_SHARD_BYTES = 5_000_000_000
WRITER = {"format": "pt", "writer": "ropewalk"}  # `format` is what transformers asks for

_FLOATS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


class Stored(NamedTuple):
    """Where a tensor lies; `start` and `end` are bytes of the file, `dtype` the format's name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Reader:
    """The tensors of a model directory: `model.safetensors`, or the shards that its index names."""

    lazy = True

    def __init__(self, directory: str | Path) -> None:
        """Reads and checks every header.

        Raises a UserError for anything but a whole, sound set of files.
        """
        self.place = str(directory)
        self.tensors = _of_directory(Path(directory))
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, mapped read-only from its file.

        Raises ModelError when it is not floating point.
        """
        return self._mapped(name, _FLOATS)

    def read_bytes(self, name: str) -> np.ndarray:
        """One tensor of bytes, as `read`. Raises ModelError when it is of anything else."""
        return self._mapped(name, {"U8": np.dtype(np.uint8)})

    def _mapped(self, name: str, known: Mapping[str, np.dtype]) -> np.ndarray:
        tensor = self.tensors[name]
        dtype = known.get(tensor.dtype)
        if dtype is None:
            raise _unsupported(name, tensor, known)
        if tensor.start == tensor.end:
            return np.empty(tensor.shape, dtype)
        return np.memmap(tensor.file, dtype, "r", tensor.start, tensor.shape)


def read_header(path: Path, root: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the metadata of one file.

    Raises a UserError unless header and file agree to the last byte.
    """
    real = regular_file(path, root)
    try:
        with real.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(file, path, size)
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with `{`")
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(
            path, f"its header of {length} bytes is not a valid JSON object: {error}"
        ) from None
    metadata = header.pop("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not strings:
        raise _bad(path, "`__metadata__` must map strings to strings")
    tensors = {name: _stored(path, real, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][3:]):
        if tensor.start != end:
            raise _bad(
                path,
                f"tensor `{name}` begins at byte {tensor.start}, the one before it ends at {end}",
            )
        end = tensor.end
    if end != size:
        raise _bad(
            path,
            f"its header describes {end} bytes, the file has {size}: it is truncated or has "
            "bytes added",
        )
    return tensors, metadata


def write(
    directory: Path,
    tensors: Sequence[Tensor],
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes `model.safetensors`, or shards and their index; returns the paths.

    Streams: one tensor is in memory at a time. A shard holds at most `max_shard_bytes`; a larger
    tensor gets one of its own.
    Raises ModelError when a value overflows `dtype`, OSError when the disk does not take it.
    """
    target = np.dtype(dtypes.parse(dtype))
    sizes = [math.prod(tensor.shape) * tensor.stored_as(target).itemsize for tensor in tensors]
    shards = _split(tensors, sizes, max_shard_bytes)
    if len(shards) == 1:
        return [_write_file(directory / SINGLE, shards[0], target)]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = list(zip(names, shards, strict=True))
    paths = [_write_file(directory / name, shard, target) for name, shard in files]
    weight_map = {tensor.name: name for name, shard in files for tensor in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*paths, directory / INDEX]


def listing(directory: Path) -> str:
    """The first names in a directory, for messages."""
    names = sorted(entry.name for entry in directory.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "nothing"


def _of_directory(directory: Path) -> dict[str, Stored]:
    if os.path.lexists(directory / SINGLE):
        return _supported(read_header(directory / SINGLE, directory)[0])
    if not os.path.lexists(directory / INDEX):
        raise ModelError(
            f"{directory}: holds neither {SINGLE} nor {INDEX}; found: {listing(directory)}"
        )
    weight_map = read_json(directory / INDEX, directory).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{directory / INDEX}: key `weight_map` must map tensor names to files")
    for name, file in weight_map.items():
        _check_inside(directory / INDEX, name, file)
    headers = {
        file: read_header(directory / file, directory)[0]
        for file in sorted(set(weight_map.values()))
    }
    tensors: dict[str, Stored] = {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if weight_map.get(name) != file:
                said = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise ModelError(
                    f"{directory / file}: holds tensor `{name}`, which {INDEX} places {said}"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise ModelError(
                f"{directory / INDEX}: places tensor `{name}` in {file}, which does not hold it"
            )
    return _supported(tensors)


def _check_inside(index: Path, name: str, file: Any) -> None:
    parts = file.replace("\\", "/").split("/") if isinstance(file, str) else [".."]
    if "" in parts or ".." in parts or "\0" in parts[-1] or not parts[-1].endswith(".safetensors"):
        raise ModelError(
            f"{index}: `weight_map` places `{name}` in {file!r}; a shard is a .safetensors "
            "file inside the directory"
        )


def _supported(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors as they are, unless one is in a format that only quantized weights have."""
    for name, tensor in tensors.items():
        if tensor.dtype.startswith(("F4", "F6_", "F8")):
            raise _unsupported(name, tensor, _FLOATS)
    return tensors


def _unsupported(name: str, tensor: Stored, known: Iterable[str]) -> ModelError:
    advice = ": use a checkpoint that is not quantized" if known is _FLOATS else ""
    return ModelError(
        f"{tensor.file}: tensor `{name}` has dtype {tensor.dtype}, which is not supported; "
        f"supported are {', '.join(known)}{advice}"
    )


def _header_length(file: BinaryIO, path: Path, size: int) -> int:
    if size < 8:
        raise _bad(path, f"it has {size} bytes, a header takes at least 8")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        most = f"{size - 8} bytes follow and {MAX_HEADER_BYTES} are allowed"
        raise _bad(path, f"it announces a header of {length} bytes, {most}")
    return length


def _stored(path: Path, real: Path, name: str, entry: Any, begin: int) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor `{name}` must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _bad(
            path,
            f"tensor `{name}` has dtype {dtype!r}, which is unknown; supported are "
            f"{', '.join(_FLOATS)}",
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _bad(
            path,
            f"tensor `{name}` has shape {shape!r} and data_offsets {offsets!r}, expected whole "
            "numbers",
        )
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * bits:
        wanted = f"{dtype} {shape} takes {math.prod(shape) * bits // 8} bytes"
        raise _bad(
            path,
            f"tensor `{name}`: {wanted}, data_offsets {offsets} give {offsets[1] - offsets[0]}",
        )
    return Stored(real, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key `{twice}` occurs twice")
    return values


def _split(tensors: Sequence[Tensor], sizes: Sequence[int], limit: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _write_file(path: Path, tensors: Iterable[Tensor], dtype: np.dtype) -> Path:
    header: dict[str, Any] = {"__metadata__": WRITER}
    end = 0
    for tensor in tensors:
        kind = tensor.stored_as(dtype)
        start, end = end, end + math.prod(tensor.shape) * kind.itemsize
        header[tensor.name] = {
            "dtype": _NAMES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(_bytes(tensor, dtype))
        file.flush()
        os.fsync(file.fileno())
    return path


def _bytes(tensor: Tensor, dtype: np.dtype) -> memoryview:
    array = np.empty(tensor.shape, tensor.stored_as(dtype))
    cast(tensor.value(), array, tensor.name)
    return array.reshape(-1).view(np.uint8).data


def _bad(path: Path, problem: str) -> ModelError:
    return ModelError(
        f"{path}: not a sound safetensors file: {problem}; download or export it again"
    )
