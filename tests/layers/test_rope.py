"""RoPE as configs describe it: the scaled kinds against plain RoPE, and YaRN's temperature."""

import math
import typing

import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from ropewalk.layers import rope
from ropewalk.ops.rope import frequencies

ADAPTER = pydantic.TypeAdapter(rope.Scaling)
PLAIN = frequencies(16, 1e4)


def turned(**values):
    return ADAPTER.validate_python(values).rotation(16, 1e4, 512)


def scaled(**values):
    found = turned(**values)
    return np.array(found.frequencies), found.scale


def test_every_type_has_a_name_in_types():
    kinds = typing.get_args(typing.get_args(rope.Scaling)[0])
    names = {typing.get_args(kind.model_fields["rope_type"].annotation)[0] for kind in kinds}
    assert names == set(rope.TYPES)


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
    both = scaled(rope_type="yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.0)[1]
    assert both == pytest.approx((0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1))


def angle(rotation, position):
    return np.arctan2(*(a[0, -1] for a in rotation.angles(jnp.arange(position + 1)[None])[::-1]))


def test_dynamic_is_plain_until_the_trained_length_and_slower_after():
    found = turned(rope_type="dynamic", factor=2.0)
    for position in (3, 511):
        np.testing.assert_allclose(
            angle(found, position), angle(turned(rope_type="default"), position), atol=1e-4
        )
    # At twice the length, s = factor * 2 - (factor - 1) = 3 and the base grows by s^(16 / 14).
    grown = rope._rotation(frequencies(16, 1e4 * 3 ** (16 / 14)))
    np.testing.assert_allclose(angle(found, 1023), angle(grown, 1023), atol=1e-3)
    # Each row goes by its own length.
    rows = jnp.stack([jnp.arange(1024), jnp.minimum(jnp.arange(1024), 3)])
    cos, _ = found.angles(rows)
    plain, _ = turned(rope_type="default").angles(rows)
    np.testing.assert_allclose(cos[1], plain[1], atol=1e-6)
    assert np.abs(cos[0] - plain[0]).max() > 0.1


def test_longrope_divides_by_one_list_or_the_other():
    short, long = [1.0 + i for i in range(8)], [3.0 + i for i in range(8)]
    values = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 64}
    found = turned(rope_type="longrope", **values)
    scale = math.sqrt(1 + math.log(512 / 64) / math.log(64))
    for position, factors in ((63, short), (64, long)):
        cos, sin = (a[0, -1] for a in found.angles(jnp.arange(position + 1)[None]))
        np.testing.assert_allclose(cos, np.cos(position * PLAIN / factors) * scale, atol=1e-5)
        np.testing.assert_allclose(sin, np.sin(position * PLAIN / factors) * scale, atol=1e-5)
    with pytest.raises(ValueError, match="long_factor has 2 entries"):
        turned(rope_type="longrope", **{**values, "long_factor": [1.0, 2.0]})
