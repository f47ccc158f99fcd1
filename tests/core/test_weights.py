"""Rules and operations, with hand-made tables."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.core.errors import ModelError
from ropewalk.core.paths import Spec
from ropewalk.core.weights import (
    COPY,
    LINEAR,
    LINEAR_OUT,
    VECTOR,
    Op,
    Rule,
    expand,
    layer_numbers,
)

sizes = st.integers(1, 4)


def spec(*shape: int) -> Spec:
    return Spec(shape, np.dtype(np.float32), (None,) * len(shape))


@pytest.mark.parametrize(
    "op", [COPY, VECTOR, LINEAR, LINEAR_OUT], ids=["copy", "vector", "linear", "out"]
)
@given(shape=st.lists(sizes, min_size=2, max_size=4).map(tuple))
def test_write_undoes_read(op: Op, shape: tuple[int, ...]) -> None:
    source = np.arange(math.prod(shape)).reshape(op.source_shape(shape))
    array = op.read(source, shape)
    assert array.shape == shape
    np.testing.assert_array_equal(op.write(array), source)


@given(d=sizes, n=sizes, h=sizes)
def test_linear_gives_the_product_that_the_file_means(d: int, n: int, h: int) -> None:
    """A file's matrix multiplies as `x @ W.T`, ours as an einsum over our letters."""
    x, heads = np.arange(d), np.arange(n * h)
    into, out = np.arange(n * h * d).reshape(n * h, d), np.arange(d * n * h).reshape(d, n * h)
    ours = np.einsum("d,dnh->nh", x, LINEAR.read(into, (d, n, h)))
    np.testing.assert_array_equal(ours.reshape(-1), x @ into.T)
    ours = np.einsum("nh,nhd->d", heads.reshape(n, h), LINEAR_OUT.read(out, (n, h, d)))
    np.testing.assert_array_equal(ours, heads @ out.T)


@pytest.mark.parametrize("op", [LINEAR, LINEAR_OUT, VECTOR])
def test_read_is_a_view_so_that_a_slice_reads_only_itself(op: Op) -> None:
    source = np.zeros(op.source_shape((2, 3, 4)))
    assert np.shares_memory(op.read(source, (2, 3, 4)), source)


def test_layers_are_numbered_through_units_and_segments() -> None:
    table = {
        "layers.segments.0.0.w": spec(1, 2),
        "layers.segments.1.0.w": spec(2, 2),
        "layers.segments.1.1.w": spec(2, 2),
        "layers.segments.1.1.only": spec(2, 5),
        "layers.segments.2.0.w": spec(1, 2),
        "head": spec(3),
    }
    numbers = {key: list(value) for key, value in layer_numbers("layers", table).items()}
    assert numbers == {(0, 0): [0], (1, 0): [1, 3], (1, 1): [2, 4], (2, 0): [5]}
    rules = (
        Rule("h.{i}.w", "layers.*.w"),
        Rule("h.{i}.only", "layers.*.only"),
        Rule("absent", "absent"),
        Rule("out", "head"),
    )
    found = {entry.source: (entry.path, entry.index, entry.shape) for entry in expand(rules, table)}
    assert found == {
        "h.0.w": ("layers.segments.0.0.w", (0,), (2,)),
        "h.1.w": ("layers.segments.1.0.w", (0,), (2,)),
        "h.3.w": ("layers.segments.1.0.w", (1,), (2,)),
        "h.2.w": ("layers.segments.1.1.w", (0,), (2,)),
        "h.4.w": ("layers.segments.1.1.w", (1,), (2,)),
        "h.5.w": ("layers.segments.2.0.w", (0,), (2,)),
        "h.2.only": ("layers.segments.1.1.only", (0,), (5,)),
        "h.4.only": ("layers.segments.1.1.only", (1,), (5,)),
        "out": ("head", (), (3,)),
    }


def test_every_parameter_has_one_rule() -> None:
    table = {"a": spec(2), "layers.segments.0.0.b": spec(1, 2)}
    with pytest.raises(
        ModelError, match=r"1 parameters have no weight rule: `layers.segments.0.0.b`"
    ):
        expand((Rule("x", "a"),), table)
    with pytest.raises(ModelError, match=r"`a` is filled by two weight rules, `x` and `y`"):
        expand((Rule("x", "a"), Rule("y", "a")), table)


def test_a_segment_stacks_one_number_of_layers() -> None:
    table = {"layers.segments.0.0.a": spec(2, 3), "layers.segments.0.0.b": spec(4, 3)}
    with pytest.raises(ModelError, match="stacks 4 layers, its segment 2"):
        layer_numbers("layers", table)
