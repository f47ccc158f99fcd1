import jax.numpy as jnp
import pytest

from ropewalk.core.dtypes import parse
from ropewalk.core.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("float32", 32), ("torch.float32", 32), ("F32", 32), ("fp32", 32),
        ("bfloat16", 16), ("torch.bfloat16", 16), ("BF16", 16), ("bf16", 16),
        ("float16", 16), ("torch.float16", 16), ("half", 16), ("F16", 16),
    ],
)  # fmt: skip
def test_every_spelling_is_one_of_three_formats(name, bits):
    dtype = parse(name)
    assert jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize * 8 == bits
    # One more bit of mantissa in float16 would be lost in bfloat16, and the range the other way.
    assert (float(jnp.finfo(dtype).max) < 1e5) == (
        name in ("float16", "torch.float16", "half", "F16")
    )


@pytest.mark.parametrize("name", ["float64", "int8", "float8_e4m3fn", "", 5, None])
def test_another_format_is_refused_with_the_known_ones(name):
    with pytest.raises(
        ConfigError, match=f"`{name}` is not supported; use one of float32, bfloat16"
    ):
        parse(name)
