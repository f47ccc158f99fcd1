"""A layout from a recipe, and what it sets on a model."""

import jax
import numpy as np
import pytest
from flax import nnx

from ropewalk.core.errors import ConfigError, LayoutError
from ropewalk.layers import dispatch
from ropewalk.layers.attention import Attention
from ropewalk.layers.moe import MoE
from ropewalk.ops import attention
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import Placement
from ropewalk.parallel.rules import RULES
from ropewalk.transforms.layout import Layout
from tests.families.tiny import tiny, tokens


def attends(model):
    return {m.attend for _, m in nnx.iter_modules(model) if isinstance(m, Attention)}


def fresh():
    return tiny("llama").running("scan", "none").model()


def test_sets_every_layer_and_returns_the_model():
    model = fresh()
    layout = Layout(stack="unroll", remat="dots", attention="library")
    assert layout.apply(model, layout.place()) is model
    assert (model.layers.run, model.layers.remat) == ("unroll", "dots")
    assert attends(model) == {attention.library}


def test_auto_attention_is_what_is_fastest_where_the_model_lies():
    layout = Layout()
    one = Placement(mesh.build({}, jax.devices()[:1]), layout.place().rules)
    for place in (one, layout.place()):
        _, wanted = attention.choose("auto", place.platform, place.mesh.size)
        assert attends(layout.apply(fresh(), place)) == {wanted}


def test_a_layout_changes_how_a_model_runs_and_not_what_it_computes():
    ids = tokens()
    wanted = jax.jit(lambda: fresh()(ids)[0])()
    for name in attention.IMPLEMENTATIONS:
        layout = Layout.parse({"stack": "unroll", "remat": "full", "attention": name})
        other = layout.apply(fresh(), layout.place())
        logits = jax.jit(lambda other=other: other(ids)[0])()
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=2e-5)


def test_a_layout_says_how_tokens_come_to_experts():
    model = tiny("mixtral").running("scan", "none").model()

    def ways(**values):
        layout = Layout.parse(values, "layout")
        placed = layout.apply(model, layout.place())
        return {m.dispatch for _, m in nnx.iter_modules(placed) if isinstance(m, MoE)}

    assert ways() == ways(experts="dropless") == {dispatch.dropless}
    assert ways(experts="dense") == {dispatch.dense}
    ids = tokens()
    wanted = jax.jit(lambda: model(ids)[0])()
    assert len(ways(experts="capacity", capacity_factor=8.0)) == 1  # room for all
    roomy = jax.jit(lambda: model(ids)[0])()
    np.testing.assert_allclose(roomy, wanted, rtol=1e-5, atol=2e-5)
    ways(experts="capacity", capacity_factor=0.5)
    assert np.max(np.abs(jax.jit(lambda: model(ids)[0])() - wanted)) > 0.1


def test_a_bare_string_names_the_rules():
    assert Layout.model_validate("fsdp_tensor") == Layout(rules="fsdp_tensor")
    assert set(Layout.model_json_schema()["properties"]["rules"]["enum"]) == set(RULES)


def test_place_takes_the_mesh_the_rules_need_or_the_one_that_is_named():
    place = Layout(rules="fsdp_tensor").place()
    assert (place.mesh.shape["fsdp"], place.mesh.shape["tensor"]) == (4, 2)
    named = Layout(rules="fsdp", mesh={"data": 2, "fsdp": -1}).place()
    assert (named.mesh.shape["data"], named.mesh.shape["fsdp"]) == (2, 4)
    assert named.rules == RULES["fsdp"]
    with pytest.raises(LayoutError, match="8 are here"):
        Layout(mesh={"fsdp": 5}).place()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rules": "zero"}, ["rules", "zero", "fsdp_tensor"]),
        ({"remat": "some"}, ["remat", "some", "dots_no_batch"]),
        ({"experts": "dropping"}, ["experts", "dropping", "capacity"]),
        ({"atention": "auto"}, ["did you mean `attention`"]),
    ],
)
def test_mistakes_are_named(values, words):
    with pytest.raises(ConfigError) as refusal:
        Layout.parse(values, "layout")
    assert all(word in str(refusal.value) for word in words), refusal.value
