"""Rotary position embedding as a model config describes it: which frequencies, and by what the
result is scaled."""

import dataclasses
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from ropewalk.core.config import Config
from ropewalk.ops import rope


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Radians per position of each pair, and the factor on cosine and sine.

    Where a sequence is longer than `trained_length`, `long` takes the frequencies' place; with
    `theta` and `factor`, NTK-aware scaling by the sequence's length does.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    """whether pairs are neighbours, and not half a head apart"""
    trained_length: int = 0
    long: tuple[float, ...] = ()
    theta: float = 0.0
    factor: float = 0.0

    def angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine, each [b, t, h/2] float32, of positions int32 [b, t]."""
        if not self.long and not self.factor:
            return rope.angles(positions, jnp.asarray(self.frequencies, jnp.float32), self.scale)
        length = (jnp.max(positions, axis=1) + 1).astype(jnp.float32)[:, None, None]
        if self.long:
            other = jnp.asarray(self.long, jnp.float32)
        else:
            size = 2 * len(self.frequencies)
            grown = jnp.maximum(self.factor * length / self.trained_length - (self.factor - 1), 1)
            base = self.theta * grown ** (size / (size - 2))
            other = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
        usual = jnp.asarray(self.frequencies, jnp.float32)
        return rope.angles(
            positions, jnp.where(length > self.trained_length, other, usual), self.scale
        )


class Default(Config):
    """Plain RoPE."""

    rope_type: Literal["default"] = "default"

    def rotation(self, dim: int, theta: float, trained_length: int) -> Rotation:
        """That of `dim` features."""
        return _rotation(rope.frequencies(dim, theta))


class Linear(Config):
    """Positions divided by `factor`."""

    rope_type: Literal["linear"]
    factor: float = pydantic.Field(ge=1)

    def rotation(self, dim: int, theta: float, trained_length: int) -> Rotation:
        """That of `dim` features."""
        return _rotation(rope.frequencies(dim, theta) / self.factor)


class Dynamic(Config):
    """A base that grows with the sequence once it is longer than the trained length; keys that a
    cache holds stay as they were turned."""

    rope_type: Literal["dynamic"]
    factor: float = pydantic.Field(ge=1)

    def rotation(self, dim: int, theta: float, trained_length: int) -> Rotation:
        """That of `dim` features."""
        plain = _rotation(rope.frequencies(dim, theta))
        return dataclasses.replace(
            plain, trained_length=trained_length, theta=theta, factor=self.factor
        )


class Llama3(Config):
    """Llama 3.1's stretch of the long waves."""

    rope_type: Literal["llama3"]
    factor: float = pydantic.Field(ge=1)
    low_freq_factor: float = pydantic.Field(gt=0)
    high_freq_factor: float = pydantic.Field(gt=0)
    original_max_position_embeddings: int = pydantic.Field(gt=0)

    def rotation(self, dim: int, theta: float, trained_length: int) -> Rotation:
        """That of `dim` features."""
        base = rope.frequencies(dim, theta)
        original = self.original_max_position_embeddings
        return _rotation(
            rope.llama3_frequencies(
                base, self.factor, self.low_freq_factor, self.high_freq_factor, original
            )
        )


class Yarn(Config):
    """YaRN, with the attention temperature folded into cosine and sine as Hugging Face does."""

    rope_type: Literal["yarn"]
    factor: float = pydantic.Field(ge=1)
    original_max_position_embeddings: int | None = pydantic.Field(default=None, gt=0)
    beta_fast: float = pydantic.Field(default=32.0, gt=0)
    beta_slow: float = pydantic.Field(default=1.0, gt=0)
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def rotation(self, dim: int, theta: float, trained_length: int) -> Rotation:
        """That of `dim` features."""
        base = rope.frequencies(dim, theta)
        original = self.original_max_position_embeddings or trained_length
        found = rope.yarn_frequencies(
            base, theta, self.factor, self.beta_fast, self.beta_slow, original, self.truncate
        )
        scale = self.attention_factor
        if scale is None and self.mscale and self.mscale_all_dim:
            scale = self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
        return _rotation(found, self.temperature() if scale is None else scale)

    def temperature(self, mscale: float = 1.0) -> float:
        """0.1 mscale ln(factor) + 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0


class LongRope(Config):
    """Two lists of divisors, one for sequences within the original length and one for longer ones.
    arXiv:2402.13753"""

    rope_type: Literal["longrope"]
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float | None = None
    """by default the trained length over the original one"""
    attention_factor: float | None = None

    def rotation(self, dim: int, theta: float, trained_length: int) -> Rotation:
        """That of `dim` features. Raises ValueError where a list has not dim / 2 entries."""
        base = rope.frequencies(dim, theta)
        for key in ("short_factor", "long_factor"):
            if len(getattr(self, key)) != len(base):
                raise ValueError(
                    f"rope_scaling.{key} has {len(getattr(self, key))} entries; a head of {dim} "
                    f"rotary features takes {len(base)}"
                )
        original = self.original_max_position_embeddings
        factor, scale = self.factor or trained_length / original, self.attention_factor
        if scale is None:
            scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short = _rotation(base / np.asarray(self.short_factor), scale)
        long = tuple((base / np.asarray(self.long_factor)).tolist())
        return dataclasses.replace(short, trained_length=original, long=long)


Scaling = Annotated[
    Default | Linear | Dynamic | Llama3 | Yarn | LongRope,
    pydantic.Field(discriminator="rope_type"),
]
TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def _rotation(frequencies: np.ndarray, scale: float = 1.0) -> Rotation:
    return Rotation(tuple(frequencies.tolist()), scale)
