import jax
import pytest

from ropewalk.core.errors import LayoutError
from ropewalk.parallel import mesh


def shape(sizes, devices=8):
    built = mesh.build(sizes, jax.devices()[:devices])
    return {name: size for name, size in built.shape.items() if size > 1}


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({"fsdp": 8}, {"fsdp": 8}),
        ({"fsdp": -1}, {"fsdp": 8}),
        ({"fsdp": -1, "tensor": 2}, {"fsdp": 4, "tensor": 2}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"data": -1, "fsdp": 8}, {"fsdp": 8}),
    ],
)
def test_sizes_multiply_to_the_devices(sizes, wanted):
    assert shape(sizes) == wanted


def test_every_device_is_used_once_and_all_axes_are_there():
    built = mesh.build({"fsdp": 4, "tensor": 2})
    assert sorted(d.id for d in built.devices.flat) == [d.id for d in jax.devices()]
    assert built.axis_names == mesh.AXES


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"fsdp": 4}, ["fsdp 4", "needs 4 devices", "8 are here", "layout.mesh"]),
        ({"fsdp": 4, "tensor": 4}, ["fsdp 4 x tensor 4", "16", "8"]),
        ({"fsdp": 3, "data": -1}, ["6 devices", "8"]),
        ({"fsdp": 16, "data": -1}, ["16", "8"]),
        ({}, ["needs 1", "8"]),
        ({"fsd": 8}, ["no axis `fsd`", "fsdp"]),
        ({"fsdp": -1, "data": -1}, ["fsdp", "data", "one axis"]),
        ({"fsdp": 0}, ["fsdp=0", "positive"]),
        ({"fsdp": -2}, ["fsdp=-2", "positive"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_its_numbers(sizes, words):
    with pytest.raises(LayoutError) as refusal:
        shape(sizes)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("rules", ["fsdp", "tensor", "fsdp_tensor", "fsdp_expert"])
def test_the_default_mesh_fits_any_number_of_devices(rules, devices):
    sizes = shape(mesh.default_sizes(rules, devices), devices)
    assert set(sizes) <= set(rules.split("_"))
