"""From logical axes to shardings: what each device holds, and what does not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ropewalk.core.errors import LayoutError
from ropewalk.core.paths import Spec
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import (
    ACTIVATION_AXES,
    PARAMETER_AXES,
    Placement,
    batch_sharding,
    kind,
    on_one_device,
    placed,
    platform,
    replicated,
    shard,
    shardings,
    spread,
)
from ropewalk.parallel.rules import RULES


def placement(rules, **sizes):
    return Placement(mesh.build(sizes or mesh.default_sizes(rules, 8)), RULES[rules])


def spec(shape, *axes):
    return Spec(shape, jnp.dtype("float32"), axes)


TABLE = {
    "embed.weight": spec((64, 32), "vocab", "embed"),
    "query.weight": spec((3, 32, 8, 4), "layers", "embed", "heads", "head_dim"),
    "key.weight": spec((3, 32, 4, 4), "layers", "embed", "kv_heads", "head_dim"),
    "out.weight": spec((3, 8, 4, 32), "layers", "heads", "head_dim", "embed"),
    "up.weight": spec((3, 32, 48), "layers", "embed", "mlp"),
    "norm.scale": spec((3, 32), "layers", "embed"),
}


def test_every_axis_of_a_rule_is_in_the_vocabulary():
    for rules in RULES.values():
        assert set(rules) <= set(PARAMETER_AXES) | set(ACTIVATION_AXES)
        assert {axis for axes in rules.values() for axis in axes} <= set(mesh.AXES)


@pytest.mark.parametrize(
    ("rules", "sizes", "parts"),
    [
        ("fsdp", {"fsdp": 8}, (8, 8, 8, 8, 8, 8)),
        ("fsdp", {"data": 2, "fsdp": 4}, (4, 4, 4, 4, 4, 4)),
        ("tensor", {"tensor": 4, "data": 2}, (4, 4, 4, 4, 4, 1)),
        ("fsdp_tensor", {"fsdp": 4, "tensor": 2}, (8, 8, 8, 8, 8, 4)),
    ],
)
def test_devices_hold_equal_and_different_parts(rules, sizes, parts):
    found = shardings(TABLE, placement(rules, **sizes))
    for (path, one), ways in zip(TABLE.items(), parts, strict=True):
        indices = found[path].devices_indices_map(one.shape)
        distinct = {str(index) for index in indices.values()}
        assert len(distinct) == ways, path
        part = found[path].shard_shape(one.shape)
        assert np.prod(part) * ways == np.prod(one.shape)


def test_a_mesh_axis_serves_one_dimension_of_an_array():
    both = {"square": spec((16, 16), "embed", "embed")}
    assert shardings(both, placement("fsdp"))["square"].spec == PartitionSpec("fsdp", None)


def test_what_does_not_divide_is_named_with_both_numbers():
    with pytest.raises(LayoutError) as refusal:
        shardings(TABLE, placement("tensor", tensor=8))
    for word in ("`key.weight`", "4 `kv_heads`", "8 devices", "tensor", "layout.mesh"):
        assert word in str(refusal.value), refusal.value


def test_a_vocabulary_that_does_not_divide_gets_the_next_that_does():
    odd = {"embed.weight": spec((67, 32), "vocab", "embed")}
    with pytest.raises(LayoutError, match=r"67 `vocab`.*8 devices.*set model.vocab_size to 72 "):
        shardings(odd, placement("tensor", tensor=8))


def test_batch_rows_lie_apart_and_an_odd_batch_is_refused():
    place = placement("fsdp_tensor", data=2, fsdp=2, tensor=2)
    rows = {
        str(index[0]) for index in batch_sharding(place, 8).devices_indices_map((8, 5)).values()
    }
    assert len(rows) == 4
    with pytest.raises(LayoutError) as refusal:
        batch_sharding(place, 6)
    for word in ("6 sequences", "4 devices", "data.batch_size", "multiple of 4"):
        assert word in str(refusal.value)


def test_one_device_takes_any_batch():
    one = Placement(mesh.build({}, jax.devices()[:1]), RULES["fsdp"])
    assert batch_sharding(one, 7).is_fully_replicated


def test_shard_constrains_a_traced_activation():
    place = placement("fsdp_tensor", fsdp=4, tensor=2)

    @jax.jit
    def run(x):
        with placed(place):
            return shard(x * 2, "batch", "time", "mlp")

    y = run(jnp.ones((8, 3, 6)))
    wanted = NamedSharding(place.mesh, PartitionSpec("fsdp", None, "tensor"))
    assert y.sharding.is_equivalent_to(wanted, 3)
    odd = run(jnp.ones((3, 3, 6)))  # three rows do not divide over four: they stay whole
    assert odd.sharding.is_equivalent_to(
        NamedSharding(place.mesh, PartitionSpec(None, None, "tensor")), 3
    )


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert shard(x, "batch", "time") is x
    with placed(Placement(mesh.build({}, jax.devices()[:1]), RULES["fsdp"])):
        assert shard(x, "batch", "time") is x


def test_placed_ends_with_its_block_even_after_an_error():
    x = jnp.ones((8, 2))
    with pytest.raises(RuntimeError), placed(placement("fsdp")):
        raise RuntimeError
    assert shard(x, "batch", "time") is x
    assert platform() == jax.default_backend()


def test_replicated_is_whole_everywhere():
    assert replicated(placement("fsdp")).is_fully_replicated


def test_kinds():
    wanted = ["embedding", "matrix", "matrix", "matrix", "matrix", "vector"]
    assert [kind(one) for one in TABLE.values()] == wanted
    assert kind(spec((32, 64), "embed", "vocab")) == "embedding"
    assert kind(spec((3, 8, 4), "layers", "heads", "head_dim")) == "vector"  # a bias
    of_experts = [("embed", "mlp"), ("mlp", "embed"), ("mlp",), ("embed",)]
    found = [kind(spec((3,) * (len(a) + 2), "layers", "experts", *a)) for a in of_experts]
    assert found == ["matrix", "matrix", "vector", "vector"]
    assert kind(spec((3, 32, 8), "layers", "embed", "experts")) == "matrix"  # a router


def test_experts_lie_apart_and_tokens_too():
    place = placement("fsdp_expert", fsdp=2, expert=4)
    table = {"gate": spec((8, 16, 6), "experts", "embed", "mlp")}
    assert shardings(table, place)["gate"].shard_shape((8, 16, 6)) == (2, 8, 6)
    assert batch_sharding(place, 8).shard_shape((8, 5)) == (1, 5)
    with pytest.raises(LayoutError, match=r"6 `experts`.*4 devices"):
        shardings({"gate": spec((6, 16, 6), "experts", "embed", "mlp")}, place)


def test_a_part_that_one_device_runs_is_not_constrained():
    with placed(placement("fsdp")):
        assert spread() is not None
        with on_one_device():
            x = jnp.ones((8, 2))
            assert spread() is None and shard(x, "batch") is x and platform() == "cpu"
