"""RoPE as configs describe it: the scaled kinds against plain RoPE, and YaRN's temperature."""

import math

import numpy as np
import pydantic
import pytest

from ropewalk.layers import rope
from ropewalk.ops.rope import frequencies

ADAPTER = pydantic.TypeAdapter(rope.Scaling)
PLAIN = frequencies(16, 1e4)


def scaled(**values):
    return ADAPTER.validate_python(values).frequencies(16, 1e4, 512)


def test_every_type_has_a_name_in_types():
    assert {"default", "linear", "llama3", "yarn"} == set(rope.TYPES)


def test_default_is_plain_rope():
    found, scale = scaled(rope_type="default")
    np.testing.assert_array_equal(found, PLAIN)
    assert scale == 1.0


def test_linear_turns_at_position_p_as_plain_rope_at_p_over_factor():
    found, scale = scaled(rope_type="linear", factor=4.0)
    np.testing.assert_allclose(8 * found, 2 * PLAIN, rtol=1e-12)
    assert scale == 1.0


def test_yarn_takes_the_trained_length_unless_it_names_one():
    named, _ = scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
    unnamed, _ = scaled(rope_type="yarn", factor=4.0)
    np.testing.assert_array_equal(named, unnamed)
    other, _ = scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    assert not np.array_equal(named, other)


def test_yarn_has_a_temperature_that_can_be_given():
    assert scaled(rope_type="yarn", factor=4.0)[1] == pytest.approx(0.1 * math.log(4) + 1)
    assert scaled(rope_type="yarn", factor=1.0)[1] == 1.0
    assert scaled(rope_type="yarn", factor=4.0, attention_factor=1.3)[1] == 1.3
