"""Native checkpoints: round trips across shardings, keep-policy, several processes."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ropewalk.checkpoint import manager
from ropewalk.core.errors import CheckpointError

SPECS = {
    "row": PartitionSpec("data"),
    "both": PartitionSpec("data", "model"),
    "column": PartitionSpec(None, ("data", "model")),
    "whole": PartitionSpec(),
}


def values(step: int) -> dict:
    random = np.random.default_rng(step)
    return {
        "params": {
            "layers.0.attention/query.weight": random.normal(size=(8, 16)).astype(np.float32),
            "embed.weight": random.normal(size=(16, 8)).astype(jnp.bfloat16),
        },
        "opt_state": {"mu.embed.weight": random.normal(size=(16, 8)).astype(np.float32)},
        "step": np.int32(step),
        "extra": {"router": {"bias": np.array([True, False])}},
    }


def placed(tree: dict, spec: PartitionSpec, devices: int = 8) -> dict:
    mesh = Mesh(
        np.asarray(jax.devices()[:devices]).reshape(-1, 4 if devices > 1 else 1), ("data", "model")
    )
    return jax.tree.map(
        lambda leaf: jax.device_put(
            leaf, NamedSharding(mesh, spec if leaf.ndim == 2 else PartitionSpec())
        ),
        tree,
    )


def abstract(tree: dict) -> dict:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def assert_equal(restored: dict, expected: dict) -> None:
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize(
    ("saved", "wanted", "devices"),
    [("both", "column", 8), ("row", "whole", 1), ("whole", "both", 8), ("column", "row", 4)],
)
def test_saved_with_one_sharding_restored_with_another(tmp_path, saved, wanted, devices) -> None:
    target = abstract(placed(values(0), SPECS[wanted], devices))
    writer = manager.Manager(tmp_path)
    state = placed(values(3), SPECS[saved])
    writer.save(3, state, recipe={"a": [1]}, data_state={"lane": {"0": 1}})
    writer.close()
    reader = manager.Manager(tmp_path)
    restored = reader.restore(target)
    reader.close()
    assert restored is not None
    assert (restored.step, restored.recipe) == (3, {"a": [1]})
    assert restored.data_state == {"lane": {"0": 1}}
    assert_equal(restored.state, values(3))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, restored.state)
    assert shardings == jax.tree.map(lambda leaf: leaf.sharding, target)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path) -> None:
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 3 + 1, tree), donate_argnums=0)
    state = {"params": {f"w{i}": jnp.full((512, 256), i, jnp.int32) for i in range(8)}}
    with_manager = manager.Manager(tmp_path, manager.Config(keep_last=10))
    expected = {}
    for step in range(6):
        expected[step] = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        with_manager.save(step, state, recipe={}, data_state={})
        for _ in range(3):
            state = advance(state)
    for step, tree in expected.items():
        restored = with_manager.restore(abstract(state), step)
        assert restored is not None and restored.step == step
        assert_equal(restored.state, tree)
    with_manager.close()


def test_an_empty_directory_restores_nothing_and_a_missing_step_is_named(tmp_path) -> None:
    state = placed(values(0), SPECS["both"])
    one = manager.Manager(tmp_path)
    assert one.restore(abstract(state)) is None and one.latest() is None
    one.save(5, state, recipe={}, data_state={}, wait=True)
    assert one.latest() == 5
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; it holds 5"):
        one.restore(abstract(state), step=4)
    one.close()


def test_a_model_of_other_shapes_is_refused(tmp_path) -> None:
    state = placed(values(0), SPECS["whole"])
    one = manager.Manager(tmp_path)
    one.save(1, state, recipe={}, data_state={}, wait=True)
    other = abstract(state)
    other["params"]["embed.weight"] = jax.ShapeDtypeStruct((32, 8), jnp.bfloat16)
    with pytest.raises(CheckpointError, match=r"params\.embed\.weight: bfloat16\[16, 8\] in the"):
        one.restore(other)
    one.close()


def test_a_step_already_there_is_left_alone_or_replaced_with_a_warning(tmp_path, caplog) -> None:
    state = placed(values(0), SPECS["row"])
    one = manager.Manager(tmp_path)
    one.save(1, state, recipe={"a": (1, 2)}, data_state={}, wait=True)
    written = (tmp_path / "1" / "manifest.json").stat().st_mtime_ns
    one.save(1, state, recipe={"a": (1, 2)}, data_state={}, wait=True)
    assert (tmp_path / "1" / "manifest.json").stat().st_mtime_ns == written
    with caplog.at_level(logging.WARNING, "ropewalk"):
        one.save(1, placed(values(9), SPECS["row"]), recipe={}, data_state={}, wait=True)
    assert "step 1 exists with other contents and is replaced" in caplog.text
    restored = one.restore(abstract(state))
    assert restored is not None
    assert_equal(restored.state, values(9))
    one.close()


def test_read_arrays_needs_no_abstract_state(tmp_path) -> None:
    one = manager.Manager(tmp_path)
    one.save(1, placed(values(4), SPECS["both"]), recipe={}, data_state={}, wait=True)
    one.close()
    assert_equal(manager.read_arrays(tmp_path / "1", "params"), values(4)["params"])
    everything = manager.read_arrays(tmp_path / "1")
    assert everything["step"] == 4 and everything["extra.router.bias"].tolist() == [True, False]
    assert manager.steps(tmp_path) == [1]


def test_the_keep_policy_at_work(tmp_path) -> None:
    keep = manager.Config(keep_last=1, keep_every=3, best_metric="loss")
    one = manager.Manager(tmp_path, keep)
    for step, loss in enumerate([5.0, 1.0, 2.0, 3.0, 4.0]):
        state = {"w": jnp.full((2,), step)}
        one.save(step, state, recipe={}, data_state={}, metrics={"loss": loss})
    one.close()
    assert one.steps() == [0, 1, 3, 4]


@given(
    found=st.sets(st.integers(0, 200), min_size=1),
    last=st.integers(1, 5),
    every=st.none() | st.integers(1, 50),
    mode=st.sampled_from(["min", "max"]),
)
def test_what_the_keep_policy_lets_go(found, last, every, mode) -> None:
    ordered = sorted(found)
    scores = {step: (step * 37) % 101 for step in ordered}
    keep = manager.Config(keep_last=last, keep_every=every, best_mode=mode)
    gone = set(manager.surplus(ordered, keep, scores))
    best = (min if mode == "min" else max)(scores.values())
    stay = set(ordered) - gone
    assert set(ordered[-last:]) <= stay and any(scores[step] == best for step in stay)
    assert all(every is None or step % every for step in gone)
    assert len(stay) <= last + 1 + (0 if every is None else sum(s % every == 0 for s in ordered))


def test_an_array_that_orbax_cannot_store_is_named(tmp_path) -> None:
    one = manager.Manager(tmp_path)
    with pytest.raises(CheckpointError, match=r"array a\.b has no elements"):
        one.save(1, {"a": {"b": jnp.zeros((0, 3))}}, recipe={}, data_state={})
    one.close()


PROCESS = """
import pathlib
import sys
import jax, jax.numpy as jnp, numpy as np
address, process, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=process)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ropewalk.checkpoint import manager
from ropewalk.core.errors import CheckpointError
mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("data", "model"))
def make(sharding):
    whole = np.arange(65536, dtype=np.float32).reshape(256, 256)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
state = {"params": {"w": make(NamedSharding(mesh, P("data", "model"))),
                    "v": make(NamedSharding(mesh, P("model")))},
         "step": jax.make_array_from_callback((), NamedSharding(mesh, P()), lambda _: np.int32(2))}
one = manager.Manager(directory)
lanes = {"epoch": 1, "lanes": {str(process): 10 + process}}
for step in (1, 2):
    one.save(step, state, recipe={"a": 1}, data_state=lanes)
one.wait()
if process == 0:  # only the part of w that process 1 reads is damaged
    files = pathlib.Path(directory, "2", "ocdbt.process_1", "d").iterdir()
    data = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    place = content.index(np.float32(65535).tobytes())
    content[place] ^= 1
    data.write_bytes(content)
abstract = {"params": {k: jax.ShapeDtypeStruct((256, 256), jnp.float32,
                          sharding=NamedSharding(mesh, P("data"))) for k in "wv"},
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))}
restored = one.restore(abstract)
for shard in restored.state["params"]["w"].addressable_shards:
    assert (shard.data == np.arange(65536, dtype=np.float32).reshape(256, 256)[shard.index]).all()
print(restored.step, restored.data_state)
try:
    one.save(3, state, recipe={}, data_state={"epoch": process})
except CheckpointError as error:
    print(error)
one.close()
"""


def test_two_processes_save_and_restore_together_and_one_restores_alone(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    source = str(Path(manager.__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(process), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        answers = [child.communicate(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], answers
    for out, err in answers:
        assert "1 {'epoch': 1, 'lanes': {'0': 10, '1': 11}}" in out
        assert "`epoch` is 0 on one and 1 on another" in out
        assert "step 2 is damaged: checksum differs in array params." in err
    whole = np.arange(65536, dtype=np.float32).reshape(256, 256)
    alone = manager.read_arrays(tmp_path / "1")
    assert (alone["params.w"] == whole).all() and (alone["params.v"] == whole).all()
    target = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = {
        "params": {k: jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=target) for k in "wv"},
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=target),
    }
    one = manager.Manager(tmp_path)
    restored = one.restore(state)
    assert restored is not None and restored.step == 1 and int(restored.state["step"]) == 2
    assert restored.data_state == {"epoch": 1, "lanes": {"0": 10, "1": 11}}
    one.close()
