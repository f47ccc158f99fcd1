"""What proves a checkpoint whole: a checksum for every array, and a manifest that vouches for all.

Knows nothing of how arrays reach the disk.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import lax

from ropewalk.core.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"

_OPENING = b'{\n "sha256": "'
_BLANK = b"0" * 64
# Orbax writes these two after the manifest; nothing in them is ever read back by us.
_COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")
_HASHED_BYTES = 1 << 16
_ROUNDS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))  # murmur3's finalizer, a bijection of 32 bits


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """What is known of one saved array: global shape, dtype name, checksum of 16 hex digits."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size of one file; its sha256 unless it is a large file of array data."""

    size_bytes: int
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`; without a whole one a step does not count."""

    step: int
    recipe: dict[str, Any]
    data_state: dict[str, Any]
    metrics: dict[str, float]
    arrays: dict[str, ArrayRecord] = dataclasses.field(default_factory=dict)
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    format: int = FORMAT


@jax.jit
def checksum(array: jax.Array) -> jax.Array:
    """64 bits, as uint32 [2], over the bits of an array of any shape and dtype.

    The same for every sharding of the same global array, and computed where the array lives. Each
    32-bit word is mixed with its position by a bijection, so a change inside one word, one bit or
    many, always changes both sums; swaps and several changes escape with a chance of about 2^-62.
    """
    words = _words(array)
    position = jnp.uint32(0x9E3779B9)
    odd = jnp.uint32(1)
    for dim in range(words.ndim):
        index = lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        position = position + index * _odd_constant(2 * dim)
        odd = odd + 2 * index * _odd_constant(2 * dim + 1)
    mixed = words + position
    for shift, factor in _ROUNDS:
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    mixed = mixed ^ (mixed >> 16)
    zero = jnp.uint32(0)  # one variadic reduce: two plain sums read the array twice and spill it
    sums = lax.reduce((mixed, mixed * odd), (zero, zero), _add_pairs, tuple(range(words.ndim)))
    return jnp.stack(sums)


def hexadecimal(sums: jax.Array) -> str:
    """A checksum as 16 hex digits; waits until the device has computed it."""
    first, second = np.asarray(sums.addressable_data(0))
    return f"{first:08x}{second:08x}"


def records(arrays: Mapping[str, Any], sums: Mapping[str, jax.Array]) -> dict[str, ArrayRecord]:
    """The records of arrays (or of their abstract shapes) whose checksums are given."""
    return {
        path: ArrayRecord(tuple(array.shape), str(array.dtype), hexadecimal(sums[path]))
        for path, array in arrays.items()
    }


def damaged_arrays(arrays: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """Paths of the arrays whose checksum is not the one recorded when they were saved."""
    sums = {path: checksum(array) for path, array in arrays.items()}  # all under way at once
    return [path for path in sums if hexadecimal(sums[path]) != manifest.arrays[path].checksum]


def list_files(directory: epath.Path) -> dict[str, FileRecord]:
    """Every file below a step's directory, by relative path, but for the manifest and commit marks.

    Large files of array data (in the `d/` folders of OCDBT) are not read: the arrays' checksums
    cover them. The small ones there are OCDBT's index.
    """
    found: dict[str, FileRecord] = {}
    for path in _walk(directory):
        name = str(path.relative_to(directory))
        if name in (MANIFEST, *_COMMIT_FILES):
            continue
        size_bytes = path.stat().length
        digest = None
        if path.parent.name != "d" or size_bytes <= _HASHED_BYTES:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[name] = FileRecord(size_bytes, digest)
    return found


def damaged_files(directory: epath.Path, manifest: Manifest) -> list[str]:
    """One sentence for each file that is missing, cut short or altered since the save."""
    found = list_files(directory)
    damage = []
    for name, record in manifest.files.items():
        now = found.get(name)
        if now is None:
            damage.append(f"file {name} is missing")
        elif now.size_bytes != record.size_bytes:
            damage.append(f"file {name} has {now.size_bytes} bytes, {record.size_bytes} were saved")
        elif now.sha256 != record.sha256:
            damage.append(f"file {name} was altered (its sha256 differs)")
    return damage


def write_manifest(directory: epath.Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, its first entry the sha256 of the file with that entry zeroed."""
    text = json.dumps({"sha256": _BLANK.decode(), **dataclasses.asdict(manifest)}, indent=1)
    data = text.encode("ascii") + b"\n"
    digest = hashlib.sha256(data).hexdigest().encode("ascii")
    (directory / MANIFEST).write_bytes(data.replace(_BLANK, digest, 1))


def read_manifest(directory: epath.PathLike) -> Manifest:
    """The manifest of one step's directory. Raises CheckpointError when missing or altered."""
    path = epath.Path(directory) / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, so the step does not count") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    start = len(_OPENING)
    digest, rest = data[start : start + 64], data[start + 64 :]
    expected = hashlib.sha256(_OPENING + _BLANK + rest).hexdigest().encode("ascii")
    if data[:start] != _OPENING or digest != expected:
        raise CheckpointError(f"{path} was altered or cut short (its sha256 differs)")
    values = json.loads(data)
    if values["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format version {values['format']}, this version of ropewalk reads "
            f"{FORMAT}; install the version that wrote it"
        )
    del values["sha256"]
    arrays = {
        name: ArrayRecord(tuple(record["shape"]), record["dtype"], record["checksum"])
        for name, record in values.pop("arrays").items()
    }
    files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
    return Manifest(**values, arrays=arrays, files=files)


def check_fits(manifest: Manifest, wanted: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError naming the first five tensors in which checkpoint and model differ.

    `wanted` maps the paths of the model's state to anything with a shape and a dtype.
    """
    differences = []
    every = sorted({*manifest.arrays, *wanted})
    for path in every:
        saved = manifest.arrays.get(path)
        model = wanted.get(path)
        theirs = f"{saved.dtype}{list(saved.shape)}" if saved else "absent"
        ours = f"{model.dtype}{list(model.shape)}" if model is not None else "absent"
        if theirs != ours:
            differences.append(f"{path}: {theirs} in the checkpoint, {ours} in the model")
    if differences:
        raise CheckpointError(
            f"{source} holds another model: {len(differences)} of {len(every)} tensors "
            f"differ, first {'; '.join(differences[:5])}. Use the recipe it was saved with, or "
            "another run name"
        )


def _words(array: jax.Array) -> jax.Array:
    """The bits of every element as uint32, 64-bit elements as a trailing dim of two."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    bits = jax.dtypes.itemsize_bits(array.dtype)
    if bits == 64:
        return lax.bitcast_convert_type(array, jnp.uint32)
    word = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]
    return lax.bitcast_convert_type(array, word).astype(jnp.uint32)


def _odd_constant(index: int) -> np.uint32:
    """A fixed odd number of 32 well-spread bits for each index."""
    digest = hashlib.sha256(b"ropewalk checksum %d" % index).digest()
    return np.uint32(int.from_bytes(digest[:4], "little") | 1)


def _add_pairs(left: Any, right: Any) -> tuple[jax.Array, jax.Array]:
    return left[0] + right[0], left[1] + right[1]


def _walk(directory: epath.Path) -> list[epath.Path]:
    found = []
    for path in sorted(directory.iterdir()):
        found.extend(_walk(path) if path.is_dir() else [path])
    return found
