"""Checksums and manifests: every flip is seen, no sharding matters, damage is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ropewalk.checkpoint import integrity
from ropewalk.core.errors import CheckpointError

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint8", "complex64")


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    size = jnp.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, size), np.uint8)
    return raw.view(jnp.dtype(dtype))[..., 0]


def reference(array: np.ndarray) -> str:
    """The same sums in plain Python integers, word by word."""
    words = array.reshape(*array.shape, 1).view(f"u{min(array.dtype.itemsize, 4)}")
    if array.dtype.itemsize <= 4:
        words = words[..., 0]
    constants = [int(integrity._odd_constant(index)) for index in range(2 * words.ndim)]
    first = second = 0
    for index in np.ndindex(words.shape):
        position = 0x9E3779B9 + sum(i * c for i, c in zip(index, constants[::2], strict=True))
        odd = 1 + 2 * sum(i * c for i, c in zip(index, constants[1::2], strict=True))
        mixed = (int(words[index]) + position) % 2**32
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
        mixed ^= mixed >> 16
        first, second = (first + mixed) % 2**32, (second + mixed * odd) % 2**32
    return f"{first:08x}{second:08x}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_equals_plain_integers(dtype: str) -> None:
    array = random_array(dtype, (3, 5))
    assert integrity.hexadecimal(integrity.checksum(jnp.asarray(array))) == reference(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_flip_changes_both_sums(dtype: str) -> None:
    array = random_array(dtype, (2, 4))
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    flipped = np.repeat(raw[None], raw.size * 8, axis=0)
    for bit in range(raw.size * 8):
        flipped[bit, bit // 8] ^= 1 << (bit % 8)
    variants = flipped.view(jnp.dtype(dtype)).reshape(-1, *array.shape)
    sums = np.asarray(jax.vmap(integrity.checksum)(jnp.asarray(variants)))
    assert (sums != np.asarray(integrity.checksum(jnp.asarray(array)))).all()


def test_swaps_and_double_sign_flips_are_seen() -> None:
    array = random_array("float32", (8, 8))
    flat = array.reshape(-1)
    first, second = np.triu_indices(flat.size, k=1)
    rows = np.arange(first.size)
    swapped = np.repeat(flat[None], first.size, axis=0)
    swapped[rows, first], swapped[rows, second] = flat[second], flat[first]
    negated = np.repeat(flat.view(np.uint32)[None], first.size, axis=0)
    negated[rows, first] ^= np.uint32(1 << 31)
    negated[rows, second] ^= np.uint32(1 << 31)
    variants = np.concatenate([swapped.view(np.uint32), negated]).reshape(-1, 8, 8)
    sums = np.asarray(jax.vmap(integrity.checksum)(jnp.asarray(variants)))
    intact = np.asarray(integrity.checksum(jnp.asarray(array)))
    assert (sums != intact).any(axis=1).all()


def test_bool_scalar_and_shape_with_one_element() -> None:
    seen = {integrity.hexadecimal(integrity.checksum(jnp.asarray(v))) for v in (True, False, 5, -5)}
    assert len(seen) == 4


@pytest.mark.parametrize(
    "spec", [("data", "model"), ("model", None), (None, ("data", "model")), (None, None)]
)
def test_checksum_is_the_same_for_every_sharding(spec: tuple) -> None:
    array = random_array("bfloat16", (8, 16))
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert integrity.hexadecimal(integrity.checksum(sharded)) == reference(array)


def manifest() -> integrity.Manifest:
    return integrity.Manifest(
        step=7,
        recipe={"name": "tiny", "text": 'quote " and ü'},
        data_state={"lanes": {"0": [1, 2]}},
        metrics={"loss": 1.25},
        arrays={"params.w": integrity.ArrayRecord((2, 3), "float32", "0" * 16)},
        files={"d/x": integrity.FileRecord(10, None)},
    )


def test_manifest_round_trip(tmp_path) -> None:
    integrity.write_manifest(epath.Path(tmp_path), manifest())
    assert integrity.read_manifest(tmp_path) == manifest()


def test_every_flip_and_truncation_of_a_manifest_is_seen(tmp_path) -> None:
    integrity.write_manifest(epath.Path(tmp_path), manifest())
    path = tmp_path / integrity.MANIFEST
    data = path.read_bytes()
    damaged = [data[:length] for length in range(len(data))]
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json was altered"):
            integrity.read_manifest(tmp_path)


def test_missing_manifest_and_other_format_are_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        integrity.read_manifest(tmp_path)
    later = integrity.Manifest(1, {}, {}, {}, format=99)
    integrity.write_manifest(epath.Path(tmp_path), later)
    with pytest.raises(CheckpointError, match="format version 99"):
        integrity.read_manifest(tmp_path)


def test_another_model_is_refused_with_the_first_five_tensors() -> None:
    shape = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    wanted = {"params.w": shape, **{f"params.x{index}": shape for index in range(6)}}
    with pytest.raises(CheckpointError) as caught:
        integrity.check_fits(manifest(), wanted, "runs/a/checkpoints/7")
    message = str(caught.value)
    assert "params.w: float32[2, 3] in the checkpoint, bfloat16[2, 3] in the model" in message
    assert "7 of 7 tensors differ" in message
    assert "params.x3: absent in the checkpoint" in message and "params.x4" not in message
