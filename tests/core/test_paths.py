import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from ropewalk.core.paths import flatten, matches, unflatten


class Module(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([nnx.List([nnx.Param(jnp.zeros(2))])])
        self.scale = nnx.Param(jnp.ones(3))


def test_leaves_of_modules_dicts_tuples_and_named_tuples_have_dotted_paths():
    assert set(flatten(Module())) == {"blocks.0.0", "scale"}
    state = optax.adam(1e-3).init({"layers.0.weight": jnp.zeros(2)})
    assert set(flatten(state)) == {
        "0.count", "0.mu.layers.0.weight", "0.nu.layers.0.weight",
    }  # fmt: skip
    assert flatten({"a": [1, (2, 3)], "b": None}) == {"a.0": 1, "a.1.0": 2, "a.1.1": 3}


def test_a_tree_comes_back_from_its_leaves():
    tree = {"a": [1, (2, 3)], "b": {"c": 4}}
    assert unflatten(tree, flatten(tree)) == tree
    doubled = {path: 2 * leaf for path, leaf in flatten(tree).items()}
    assert unflatten(jax.tree.map(lambda _: 0, tree), doubled) == jax.tree.map(
        lambda x: 2 * x, tree
    )
    with pytest.raises(KeyError, match=r"b\.c"):
        unflatten(tree, {path: 0 for path in flatten(tree) if path != "b.c"})


@pytest.mark.parametrize(
    ("path", "patterns", "wanted"),
    [
        ("layers.0.mlp.up.weight", ["*.mlp.*"], True),
        ("layers.0.mlp.up.weight", ["layers.*.weight"], True),
        ("layers.0.mlp.up.weight", ["*.MLP.*"], False),
        ("layers.0.mlp.up.weight", ["mlp"], False),
        ("a", ["b", "a"], True),
        ("a", [], False),
    ],
)
def test_globs_cross_dots_and_mind_case(path, patterns, wanted):
    assert matches(path, patterns) == wanted
