"""Our reader and writer against the safetensors library, and against files made to deceive."""

import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.checkpoint.safetensors import (
    INDEX,
    SINGLE,
    Reader,
    read_header,
    write,
)
from ropewalk.core.errors import ModelError, UserError
from tests.checkpoint.tiny import tensors

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.c": np.arange(4, dtype=np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(2.5, np.float32),
    "brain": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(3, 2),
}


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header; `length` is what it announces, right by default."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=5),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    limit=st.integers(1, 400),
)
def test_what_we_write_both_readers_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: list, dtype: str, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    generator = np.random.default_rng(0)
    arrays = {
        f"t{i}": generator.standard_normal(shape).astype(np.float32)
        for i, shape in enumerate(shapes)
    }
    paths = write(folder, tensors(arrays), dtype, limit)
    ours = Reader(folder)
    theirs: dict[str, np.ndarray] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            shard = safetensors.numpy.load_file(path)
            assert len(shard) == 1 or sum(array.nbytes for array in shard.values()) <= limit
            theirs |= shard
    assert ours.shapes.keys() == theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        expected = array.astype(theirs[name].dtype)
        assert theirs[name].dtype == dtype
        np.testing.assert_array_equal(theirs[name], expected)
        np.testing.assert_array_equal(ours.read(name), expected)
        assert ours.read(name).dtype == dtype


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    safetensors.numpy.save_file(ARRAYS, tmp_path / SINGLE, {"format": "pt"})
    reader = Reader(tmp_path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(reader.read(name), array)
        assert reader.shapes[name] == array.shape


def test_the_index_counts_bytes_and_names_every_tensor(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.full((4, 4), i, np.float32) for i in range(5)}
    names = [path.name for path in write(tmp_path, tensors(arrays), "float32", 128)]
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    assert index["weight_map"]["t2"] == names[1]


def test_writing_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    size, count = 1 << 18, 12
    source = np.zeros(size, np.float32)
    tracemalloc.start()
    write(tmp_path, tensors({f"t{i}": source for i in range(count)}), "float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * source.nbytes


SOUND = raw({"a": entry()}, b"\0" * 8)
HEADERS = {
    "no length": (b"\0\0\0", "3 bytes, a header takes at least 8"),
    "empty": (b"", "0 bytes"),
    "header of 0 bytes": (raw(b""), "header of 0 bytes"),
    "header larger than the file": (raw({}, length=1000), "header of 1000 bytes, 2 bytes follow"),
    "header of 2**63 bytes": (raw({}, length=2**63), "9223372036854775808 bytes"),
    "not an object": (raw(b"[1,2]"), "does not begin with `{`"),
    "cut header": (raw(b'{"a": '), "not a valid JSON object"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not a valid JSON object"),
    "nested beyond reason": (raw(b'{"a":' * 200_000), "not a valid JSON object"),
    "duplicate tensor": (
        raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
        "key `a` occurs twice",
    ),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "`__metadata__` must map strings"),
    "extra key": (raw({"a": entry() | {"x": 1}}, b"\0" * 8), "exactly dtype, shape"),
    "entry not an object": (raw({"a": 3}), "exactly dtype, shape"),
    "unknown dtype": (raw({"a": entry("F7")}, b"\0" * 8), "dtype 'F7', which is unknown"),
    "dtype a list": (raw({"a": entry([])}, b"\0" * 8), r"dtype \[\], which is unknown"),
    "negative size": (raw({"a": entry(shape=(-2,))}, b"\0" * 8), "expected whole numbers"),
    "size of 2**63": (raw({"a": entry(shape=(0, 2**63))}, b"\0" * 8), "expected whole numbers"),
    "fractional size": (raw({"a": entry(shape=(2.0,))}, b"\0" * 8), "expected whole numbers"),
    "boolean size": (raw({"a": entry(shape=(True,))}, b"\0" * 8), "expected whole numbers"),
    "shape not a list": (raw({"a": entry(shape="2")}, b"\0" * 8), "expected whole numbers"),
    "three offsets": (raw({"a": entry(offsets=(0, 4, 8))}, b"\0" * 8), "expected whole numbers"),
    "end before begin": (raw({"a": entry(offsets=(8, 0))}, b"\0" * 8), "takes 8 bytes"),
    "product of 2**70": (raw({"a": entry(shape=(2**35, 2**35))}), "takes 4722366482869645213696"),
    "shape against bytes": (raw({"a": entry(shape=(3,))}, b"\0" * 8), "takes 12 bytes.* give 8"),
    "begins late": (raw({"a": entry(offsets=(8, 16))}, b"\0" * 16), "begins at byte"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(16, 24))}, b"\0" * 24), "`b` begins at"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "`b` begins at"),
    "truncated": (SOUND[:-1], r"describes \d+ bytes, the file has \d+: it is truncated"),
    "bytes added": (SOUND + b"x", "has bytes added"),
    "eight-bit floats": (raw({"a": entry("F8_E4M3", (8,))}, b"\0" * 8), "dtype F8_E4M3.*quantized"),
    "four-bit floats": (raw({"a": entry("F4", (16,))}, b"\0" * 8), "dtype F4.*quantized"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_unsound_files_are_refused(tmp_path: Path, case: str) -> None:
    content, problem = HEADERS[case]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ModelError, match=problem) as failure:
        Reader(tmp_path)
    assert str(tmp_path / SINGLE) in str(failure.value)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.arange(3)}, tmp_path / SINGLE)
    reader = Reader(tmp_path)
    with pytest.raises(ModelError, match=r"`a` has dtype I64.*supported are F64, F32, F16, BF16"):
        reader.read("a")


def test_bytes_are_asked_for_by_their_own_name(tmp_path: Path) -> None:
    write(tmp_path, tensors({"scales": np.ones(2, np.float32)}))
    with pytest.raises(ModelError, match=r"`scales` has dtype F32.*; supported are U8$"):
        Reader(tmp_path).read_bytes("scales")


def _fuzzed(data: st.DataObject) -> bytes:
    content = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    return bytes(content[: data.draw(st.integers(0, len(content)))]) + data.draw(st.binary())


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_bytes_read_or_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(_fuzzed(data))
    try:
        read_header(path, tmp_path)
    except ModelError:
        return
    assert Reader(tmp_path).shapes.keys() == safetensors.numpy.load_file(path).keys()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _link_out(path: Path) -> None:
    outside = path.absolute().parent.parent / "outside.safetensors"
    outside.write_bytes(SOUND)
    path.symlink_to(outside)


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (_pipe, "is a named pipe, not a regular file"),
    "socket": (_socket, "is a socket, not a regular file"),
    "directory": (Path.mkdir, "is a directory, not a regular file"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "leads to /dev/zero, outside"),
    "link out": (_link_out, "outside of"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path), "cannot be read"),
}


@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.parametrize("sharded", [False, True])
def test_only_regular_files_of_the_directory_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, sharded: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make, problem = SPECIAL[case]
    name = "shard.safetensors" if sharded else SINGLE
    if sharded:
        Path(INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    make(Path(name))
    with pytest.raises(UserError, match=problem):
        Reader(".")


def test_a_link_within_the_directory_is_a_file_of_it(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(SOUND)
    (tmp_path / SINGLE).symlink_to("weights/w.bin")
    assert Reader(tmp_path).shapes == {"a": (2,)}


def test_a_hub_cache_links_to_its_own_blobs_only(tmp_path: Path) -> None:
    revision = tmp_path / "models--someone--model" / "snapshots" / "abc"
    revision.mkdir(parents=True)
    blobs = revision.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "0123").write_bytes(SOUND)
    (revision / SINGLE).symlink_to("../../blobs/0123")
    assert Reader(revision).shapes == {"a": (2,)}
    (revision / SINGLE).unlink()
    (tmp_path / "models--other").mkdir()
    (tmp_path / "models--other" / "0123").write_bytes(SOUND)
    (revision / SINGLE).symlink_to("../../../models--other/0123")
    with pytest.raises(UserError, match="outside of"):
        Reader(revision)


@pytest.mark.parametrize(
    "file",
    ["/etc/shard.safetensors", "../shard.safetensors", "a/../../shard.safetensors",
     "..\\s.safetensors", "shard.bin", "", ".", "a\0.safetensors", 3, None, ["shard.safetensors"]],
)  # fmt: skip
def test_the_index_may_not_leave_the_directory(tmp_path: Path, file: Any) -> None:
    (tmp_path.parent / "shard.safetensors").write_bytes(SOUND)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(
        ModelError, match=r"index.json: `weight_map` places `a` in .* inside the dir"
    ):
        Reader(tmp_path)


INDEXES = {
    "list": ([], "expected an object"),
    "no map": ({}, "`weight_map` must map"),
    "map is a list": ({"weight_map": [1]}, "`weight_map` must map"),
    "no shard": ({"weight_map": {"a": "gone.safetensors"}}, "cannot be read: No such file"),
    "tensor elsewhere": ({"weight_map": {"b": "s.safetensors"}}, "`a`, which .* places nowhere"),
    "tensor absent": (
        {"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}},
        "places tensor `b` in s.safetensors, which does not hold it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEXES)
def test_index_and_shards_agree(tmp_path: Path, case: str) -> None:
    index, problem = INDEXES[case]
    (tmp_path / "s.safetensors").write_bytes(SOUND)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=problem):
        Reader(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("s.safetensors", "t.safetensors"):
        (tmp_path / name).write_bytes(SOUND)
    weight_map = {"a": "s.safetensors", "b": "t.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        ModelError, match=r"t.safetensors: holds tensor `a`, which .* in s.safetensors"
    ):
        Reader(tmp_path)


def test_a_directory_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"holds neither .*found: notes.txt"):
        Reader(tmp_path)
