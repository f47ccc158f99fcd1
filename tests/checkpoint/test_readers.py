"""Other spellings of a checkpoint, against the arrays they stand for."""

import itertools

import numpy as np
import pytest

from ropewalk.checkpoint.readers import Mxfp4, usual
from ropewalk.core.errors import ModelError


class Held:
    """A reader of arrays in memory."""

    place, lazy = "here", True

    def __init__(self, arrays):
        self.arrays = arrays
        self.shapes = {name: array.shape for name, array in arrays.items()}

    def read(self, name):
        return self.arrays[name]

    read_bytes = read


WANTED = ("model.embed.weight", "model.layers.0.a.weight", "lm_head.weight")


@pytest.mark.parametrize(
    "names",
    [
        WANTED,
        ("embed.weight", "layers.0.a.weight"),
        tuple(f"language_model.{name}" for name in WANTED),
        ("model.language_model.embed.weight", "model.language_model.layers.0.a.weight", WANTED[2]),
    ],
)
@pytest.mark.parametrize("beside", [(), ("vision_tower.a.weight", "multi_modal_projector.b")])
def test_a_prefix_too_many_or_too_few_is_seen_through(names, beside):
    arrays = {name: np.full(2, i) for i, name in enumerate((*names, *beside))}
    reader = usual(Held(arrays), WANTED)
    for i, wanted in enumerate(WANTED[: len(names)]):
        assert reader.shapes[wanted] == (2,)
        np.testing.assert_array_equal(reader.read(wanted), np.full(2, i))
    # Where nothing had to be renamed, what is beside stays, to be refused by name.
    assert len(reader.shapes) == len(names) + (len(beside) if names == WANTED else 0)


def test_mxfp4_is_its_definition():
    """OCP Microscaling Formats 1.0, section 5.3: sign, two bits of exponent (bias 1), one of
    fraction; a scale is a power of two, biased by 127."""

    def number(code):
        sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
        size = fraction * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2)
        return -size if sign else size

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 4, 16), np.uint8)
    scales = rng.integers(120, 134, (2, 3, 4), np.uint8)
    held = {"w_blocks": blocks, "w_scales": scales, "other": np.ones(3, np.float32)}
    reader = Mxfp4(Held(held))
    assert reader.shapes == {"w": (2, 128, 3), "other": (3,)}
    found = reader.read("w")
    for e, o, g, i in itertools.product(range(2), range(3), range(4), range(32)):
        byte = int(blocks[e, o, g, i // 2])
        code = byte >> 4 if i % 2 else byte & 15
        assert found[e, 32 * g + i, o] == number(code) * 2.0 ** (int(scales[e, o, g]) - 127)
    np.testing.assert_array_equal(reader.read("other"), np.ones(3))


def test_scales_that_do_not_fit_are_refused():
    blocks = {"w_blocks": np.zeros((2, 4, 16), np.uint8), "w_scales": np.zeros((2, 3), np.uint8)}
    with pytest.raises(ModelError, match=r"w_scales` \[2, 3\] are no MXFP4"):
        Mxfp4(Held(blocks)).read("w")
