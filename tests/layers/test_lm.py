"""The table of parameters, and modules taken apart and put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ropewalk.layers.embedding import Embedding
from ropewalk.layers.linear import Linear, depth_std
from ropewalk.layers.lm import parameters, table, with_parameters
from tests.families.tiny import forward, tiny, tokens

NAME = "llama"


def test_the_table_describes_the_parameters():
    it = tiny(NAME)
    found = parameters(it.model())
    assert list(found) == list(it.table)
    for path, spec in it.table.items():
        assert (found[path].shape, found[path].dtype) == (spec.shape, spec.dtype)
    assert table(it.model()) == it.table, "an abstract and a concrete module have one table"


def test_only_parameters_of_stacked_blocks_have_a_layer_axis():
    for path, spec in tiny(NAME).table.items():
        assert (spec.axes[0] == "layers") == path.startswith("layers."), path


def test_parameters_go_out_and_come_back():
    it = tiny(NAME)
    other = {path: value + 1 for path, value in it.params.items()}
    back = parameters(it.model(other))
    assert all(back[path] is other[path] for path in other)
    missing = dict(list(other.items())[1:])
    with pytest.raises(KeyError):
        with_parameters(it.structure, missing)


def test_hidden_then_unembed_is_the_call():
    it, ids = tiny(NAME), tokens()
    x, cache, aux = it.model().hidden(jnp.asarray(ids))
    assert cache is None and aux == {}
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    logits = forward(NAME, "plain")(ids, positions, np.ones_like(ids))
    np.testing.assert_allclose(it.model().unembed(x), logits, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(
        jnp.einsum(
            "btd,vd->btv" if it.model().head_by_row else "btd,dv->btv", x, it.model().head_params()
        ),
        logits,
        rtol=1e-5,
        atol=2e-5,
    )


def test_a_tied_head_is_the_embedding():
    it = tiny(NAME, "options")
    assert it.config.tie_word_embeddings and "head.weight" not in it.table
    np.testing.assert_array_equal(it.model().head_params(), it.params["embed.weight"])


def test_flops_grow_with_tokens_and_with_length():
    model = tiny(NAME).model()
    assert model.flops(200, 10) == 2 * model.flops(100, 10)
    per_token = [model.flops(1, length) for length in (0, 10, 20)]
    assert per_token[2] - per_token[1] == per_token[1] - per_token[0] > 0


def test_a_linear_starts_with_its_standard_deviation():
    layer = Linear((64,), (8, 16), ("embed", "heads", "head_dim"), std=0.5, rngs=nnx.Rngs(0))
    assert float(jnp.std(layer.weight[...])) == pytest.approx(0.5, rel=0.03)
    assert layer(jnp.ones((2, 3, 64))).shape == (2, 3, 8, 16)
    biased = Linear((64,), (8, 16), ("embed", "heads", "head_dim"), bias=True, rngs=nnx.Rngs(0))
    assert biased.bias is not None and biased.bias.get_metadata()["axes"] == ("heads", "head_dim")


def test_more_layers_write_less_each_to_the_residual_stream():
    assert depth_std(8) == pytest.approx(depth_std(2) / 2)


def test_an_embedding_is_a_table():
    embed = Embedding(10, 4, rngs=nnx.Rngs(0))
    ids = jnp.array([[3, 0], [9, 3]])
    np.testing.assert_array_equal(embed(ids), np.asarray(embed.weight[...])[np.asarray(ids)])


def test_a_model_is_the_same_for_the_same_seed_only():
    it = tiny(NAME)

    def start(seed):
        model = it.family.Model(it.config, rngs=nnx.Rngs(seed))
        return jax.jit(lambda: parameters(model))()["embed.weight"]

    first, again, other = start(0), start(0), start(1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
