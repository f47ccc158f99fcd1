"""Loading and exporting by rules: identity, shardings, memory, and tensors that do not fit."""

import tracemalloc
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ropewalk.checkpoint import weights
from ropewalk.core.errors import ModelError
from ropewalk.core.paths import Spec
from tests.checkpoint.tiny import RULES, parameters, random, table

sizes = st.integers(1, 3)


class Memory:
    """A reader of arrays in memory that counts what is read."""

    place = "memory"

    def __init__(self, tensors: Mapping[str, np.ndarray], lazy: bool = True) -> None:
        self.tensors = dict(tensors)
        self.lazy = lazy
        self.reads: list[str] = []

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        self.reads.append(name)
        return self.tensors[name]


def checkpoint(specs: Mapping[str, Spec], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {t.name: t.value() for t in weights.export(params, RULES, specs)}


@settings(max_examples=40, deadline=None)
@given(
    layers=sizes, d=sizes, n=sizes, k=sizes, h=sizes, f=sizes, v=sizes, units=st.integers(1, 2),
    tied=st.booleans(), biased=st.booleans(),
)  # fmt: skip
def test_import_undoes_export(**numbers: Any) -> None:
    specs = table(**numbers)
    params = random(specs)
    exported = checkpoint(specs, params)
    assert sum(array.size for array in exported.values()) == parameters(specs)
    loaded = weights.load_into(Memory(exported), RULES, specs)
    assert loaded.keys() == specs.keys()
    for path, array in loaded.items():
        assert isinstance(array, jax.Array)
        np.testing.assert_array_equal(array, params[path], err_msg=path)


def test_export_gives_the_shapes_and_names_of_the_checkpoint() -> None:
    specs = table(layers=1, d=6, n=2, k=1, h=4, f=5, v=7, tied=False, units=2)
    params = jax.device_put(random(specs))
    shapes = {t.name: t.shape for t in weights.export(params, RULES, specs)}
    assert shapes.items() >= {
        "model.layers.1.self_attn.q_proj.weight": (8, 6),
        "model.layers.1.self_attn.o_proj.weight": (6, 8),
        "model.layers.1.mlp.down_proj.weight": (6, 5),
        "lm_head.weight": (7, 6),
    }.items()  # fmt: skip
    for tensor in weights.export(params, RULES, specs):
        assert tensor.value().shape == tensor.shape


@pytest.mark.parametrize("lazy", [True, False])
def test_sharded_load_equals_the_whole(lazy: bool) -> None:
    specs = table(layers=4)
    params = random(specs)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("l", "x", "y"))
    axes = {
        4: PartitionSpec("l", "x", "y"),
        3: PartitionSpec(None, ("x", "y")),
        2: PartitionSpec("x"),
        1: PartitionSpec(),
    }
    shardings = {path: NamedSharding(mesh, axes[len(spec.shape)]) for path, spec in specs.items()}
    reader = Memory(checkpoint(specs, params), lazy)
    loaded = weights.load_into(reader, RULES, specs, shardings)
    for path, array in loaded.items():
        assert array.sharding == shardings[path]
        np.testing.assert_array_equal(array, params[path], err_msg=path)
    exported = checkpoint(specs, loaded)
    for name, tensor in reader.tensors.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)


def test_a_device_reads_only_the_layers_it_holds() -> None:
    specs = table(layers=4)
    reader = Memory(checkpoint(specs, random(specs)))
    mesh = Mesh(np.array(jax.devices()[:4]), ("l",))
    shardings = {path: NamedSharding(mesh, PartitionSpec()) for path in specs}
    shardings["layers.segments.0.0.mlp.up.weight"] = NamedSharding(mesh, PartitionSpec("l"))
    weights.load_into(reader, RULES, specs, shardings)
    assert sorted(name for name in reader.reads if "up_proj" in name) == [
        f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_cast_on_the_way_in(dtype: str) -> None:
    specs = table()
    params = random(specs)
    loaded = weights.load_into(Memory(checkpoint(specs, params)), RULES, specs, dtype=dtype)
    for path, array in loaded.items():
        np.testing.assert_array_equal(array, params[path].astype(array.dtype), err_msg=path)
        assert array.dtype == dtype


@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_overflow_is_refused_and_infinity_kept(source: type) -> None:
    target = np.empty(3, np.float16)
    with pytest.raises(ModelError, match=r"`x`: 1 values up to .* overflow float16.* 6.55e\+04"):
        weights.cast(np.array([1, np.inf, 1e6], source), target, "x")
    weights.cast(np.array([1, np.inf, 2], source), target, "x")
    np.testing.assert_array_equal(target, [1, np.inf, 2])


def test_tied_head_in_the_file_must_equal_the_embedding() -> None:
    specs = table()
    tensors = checkpoint(specs, random(specs))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert "head.weight" not in weights.load_into(Memory(tensors), RULES, specs)
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(ModelError, match="tie_word_embeddings to false"):
        weights.load_into(Memory(tensors), RULES, specs)


def test_old_rotary_buffers_are_ignored() -> None:
    specs = table()
    tensors = checkpoint(specs, random(specs))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4)
    weights.load_into(Memory(tensors), RULES, specs)


def test_missing_unexpected_and_misshapen_tensors_are_listed() -> None:
    specs = table(layers=8)
    tensors = checkpoint(specs, random(specs))
    for i in range(7):
        del tensors[f"model.layers.{i}.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tensors["model.norm.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ModelError) as failure:
        weights.load_into(Memory(tensors), RULES, specs)
    message = str(failure.value)
    assert "7 missing: model.layers.0.mlp.up_proj.weight [96, 64]" in message
    assert "model.layers.4.mlp.up_proj.weight [96, 64] and 2 more" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias [64]" in message
    assert "1 of another shape: model.norm.weight (file [3], model [64])" in message


def test_export_wants_the_parameters_of_the_table() -> None:
    specs = table()
    params = random(specs)
    params["embed.weight"] = params["embed.weight"][:-1]
    del params["final_norm.scale"]
    with pytest.raises(ModelError, match=r"2 parameters .* embed.weight \(have \(31, 64\), model"):
        weights.export(params, RULES, specs)


def test_load_allocates_the_model_and_no_more() -> None:
    """Numpy's allocations; jax takes over the aligned buffers instead of copying them."""
    specs = table(layers=16, d=128, f=256, v=512)
    reader = Memory(checkpoint(specs, random(specs)))
    model = 4 * parameters(specs)
    tracemalloc.start()
    loaded = weights.load_into(reader, RULES, specs)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(loaded) == len(specs)
    assert 0.99 * model < held < 1.05 * model
    assert peak < 1.05 * model
