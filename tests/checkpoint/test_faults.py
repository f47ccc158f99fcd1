"""Damage of every kind to every file, kills inside saves, a full disk: never wrong values."""

import gc
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.checkpoint import manager
from ropewalk.core.errors import CheckpointError

FLIPS = 12


def values(step: int) -> dict[str, dict[str, np.ndarray]]:
    source = np.random.default_rng(step)
    return {
        "params": {
            "large": source.normal(size=(128, 128)).astype(np.float32),
            "half": source.normal(size=(256, 256)).astype(jnp.bfloat16),
            "small": source.normal(size=(3,)).astype(np.float32),
        },
        "opt_state": {"mu": source.normal(size=(128, 128)).astype(np.float32)},
    }


def abstract() -> dict:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), values(0)
    )


def equal(state: dict, step: int) -> bool:
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(values(step)), strict=True)
    return all(np.asarray(mine).tobytes() == np.asarray(theirs).tobytes() for mine, theirs in pairs)


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """Two good steps, 1 and 2."""
    directory = tmp_path_factory.mktemp("intact")
    one = manager.Manager(directory)
    for step in (1, 2):
        one.save(step, jax.tree.map(jnp.asarray, values(step)), recipe={}, data_state={"at": step})
    one.close()
    return directory


def files_of(step_directory: Path) -> list[str]:
    found = [path for path in step_directory.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(step_directory)) for path in found)


def flip(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place // 8] ^= 1 << (place % 8)
    return bytes(changed)


def damages(data: bytes, seed: int) -> list[bytes | None]:
    """What may become of a file: flipped, cut short, emptied, junk, longer, gone (None)."""
    source = random.Random(seed)
    flips: list[bytes | None] = [
        flip(data, source.randrange(len(data) * 8)) for _ in range(FLIPS if data else 0)
    ]
    junk = source.randbytes(max(len(data), 1))
    return [*flips, data[:-1], data[: len(data) // 2], b"", junk, b"{}", data + b"\0", None]


def outcome(directory: Path, caplog) -> tuple[int, str]:
    """Restores; the step that came, proved bit-equal, and what was said about it."""
    caplog.clear()
    one = manager.Manager(directory)
    with caplog.at_level(logging.WARNING, "ropewalk"):
        restored = one.restore(abstract())
    one.close()
    assert restored is not None
    assert equal(restored.state, restored.step), "wrong values came back silently"
    assert restored.data_state == {"at": restored.step}
    return restored.step, caplog.text


# Orbax drops its other reads when one fails, and does not await them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_kind_of_damage_to_every_file_is_seen(intact, tmp_path, caplog) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(intact, directory)
    counted = fallen_back = 0
    for name in files_of(intact / "2"):
        path = directory / "2" / name
        data = path.read_bytes()
        for damaged in damages(data, seed=len(name)):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            step, said = outcome(directory, caplog)
            counted += 1
            if step == 1:
                fallen_back += 1
                assert "step 2 is damaged" in said and "step 1 is used" in said
                assert (
                    name in said or "checksum differs in array" in said or "cannot be read" in said
                )
            unread = name in ("_CHECKPOINT_METADATA", "commit_success.txt")
            assert step == 1 or unread or damaged is not None
            path.write_bytes(data)
    assert counted > 150 and fallen_back > 100
    assert outcome(directory, caplog) == (2, "")
    gc.collect()  # here, where the warning is expected


def test_every_flip_inside_array_data_names_the_array(intact, tmp_path, caplog) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(intact, directory)
    source = random.Random(0)
    files = [directory / "2" / name for name in files_of(intact / "2")]
    for path, name in (("params.large", "large"), ("params.half", "half"), ("opt_state.mu", "mu")):
        array = {**values(2)["params"], **values(2)["opt_state"]}[name]
        holder = next(file for file in files if array.tobytes() in file.read_bytes())
        data = holder.read_bytes()
        start = data.index(array.tobytes()) * 8
        for _ in range(10):
            holder.write_bytes(flip(data, start + source.randrange(array.nbytes * 8)))
            step, said = outcome(directory, caplog)
            assert step == 1 and f"checksum differs in array {path}; step 1 is used" in said
        holder.write_bytes(data)


def test_arrays_exchanged_between_steps_are_seen(intact, tmp_path, caplog) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(intact, directory)
    (directory / "2" / "manifest.json").write_bytes((intact / "1" / "manifest.json").read_bytes())
    step, said = outcome(directory, caplog)
    assert step == 1 and "step 2 is damaged" in said


def test_when_no_step_is_good_each_is_listed_with_its_reason(intact, tmp_path) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(intact, directory)
    (directory / "1" / "_METADATA").unlink()
    (directory / "2" / "manifest.json").write_bytes(b"{}")
    one = manager.Manager(directory)
    with pytest.raises(CheckpointError) as caught:
        one.restore(abstract())
    one.close()
    message = str(caught.value)
    assert "step 1: file _METADATA is missing" in message
    assert "step 2: " in message and "manifest.json was altered" in message


def test_a_damaged_step_is_written_anew_and_does_not_push_out_good_ones(intact, tmp_path) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(intact, directory)
    (directory / "2" / "_METADATA").write_bytes(b"junk")
    one = manager.Manager(directory, manager.Config(keep_last=1))
    assert one.restore(abstract()) is not None
    assert one.steps() == [1]
    one.save(2, jax.tree.map(jnp.asarray, values(2)), recipe={}, data_state={"at": 2}, wait=True)
    again = one.restore(abstract())
    one.close()
    assert again is not None and again.step == 2 and equal(again.state, 2)
    assert one.steps() == [2]


def test_read_arrays_refuses_damage(intact, tmp_path) -> None:
    for name in files_of(intact / "2"):
        if name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            continue
        directory = tmp_path / name.replace("/", "_")
        shutil.copytree(intact / "2", directory)
        (directory / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            manager.read_arrays(directory, "params")


CHILD = """
import sys
import jax, numpy as np
from ropewalk.checkpoint import manager
one = manager.Manager(sys.argv[1], manager.Config(keep_last=2))
step = (one.latest() or 0) + 1
while True:
    state = {"params": {f"w{i}": jax.numpy.asarray(np.random.default_rng([step, i]).integers(
        0, 2**31, (256, 256), np.int32)) for i in range(12)}}
    one.save(step, state, recipe={}, data_state={"at": step})
    print("under way", flush=True)
    step += 1
"""


def test_killed_at_random_moments_inside_saves(tmp_path) -> None:
    source = random.Random(os.environ.get("KILL_SEED", "1"))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct((256, 256), jnp.int32, sharding=sharding)
    target = {"params": {f"w{index}": shape for index in range(12)}}
    newest = 0
    for _ in range(int(os.environ.get("KILLS", "3"))):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(source.randint(2, 5)):
            assert child.stdout.readline() == "under way\n"
        time.sleep(source.random() * 0.1)
        child.kill()
        child.communicate()
        one = manager.Manager(tmp_path)
        assert all(path.name.isdecimal() for path in tmp_path.iterdir())
        restored = one.restore(target)
        one.close()
        assert restored is not None
        assert restored.step > newest and restored.data_state == {"at": restored.step}
        newest = restored.step
        for index in range(12):
            expected = np.random.default_rng([newest, index]).integers(
                0, 2**31, (256, 256), np.int32
            )
            assert (np.asarray(restored.state["params"][f"w{index}"]) == expected).all()


def full_by_quota(monkeypatch) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def full_by_size(monkeypatch) -> None:
    """A small file system would need the right to mount; all else here is real."""
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda path: usage)


# A write that fails late reports to an event loop that Orbax has already closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("fill", "said"), [(full_by_quota, "File too large"), (full_by_size, "100")]
)
def test_a_full_disk_fails_the_save_and_keeps_the_last_good_step(
    intact, tmp_path, monkeypatch, caplog, fill: Callable, said: str
) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(intact, directory)
    state = jax.tree.map(jnp.asarray, values(3))
    one = manager.Manager(directory)
    fill(monkeypatch)
    try:
        expected = rf"step 3 could not be saved.*{said}.*kept: 1, 2"
        with pytest.raises(CheckpointError, match=expected):
            one.save(3, state, recipe={}, data_state={})
            one.save(4, state, recipe={}, data_state={})  # an error of the save before comes here
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        monkeypatch.undo()
    assert one.steps() == [1, 2]
    one.save(3, state, recipe={}, data_state={"at": 3}, wait=True)
    one.close()
    assert outcome(directory, caplog) == (3, "")
    gc.collect()
