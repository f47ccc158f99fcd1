"""Rotary position embedding as a model config describes it: which frequencies, and by what the
result is scaled."""

import math
from typing import Annotated, Literal

import numpy as np
import pydantic

from ropewalk.core.config import Config
from ropewalk.ops import rope


class Default(Config):
    """Plain RoPE."""

    rope_type: Literal["default"] = "default"

    def frequencies(
        self, head_dim: int, theta: float, trained_length: int
    ) -> tuple[np.ndarray, float]:
        """Radians per position [h/2], and the factor on cosine and sine."""
        return rope.frequencies(head_dim, theta), 1.0


class Linear(Config):
    """Positions divided by `factor`."""

    rope_type: Literal["linear"]
    factor: float = pydantic.Field(ge=1)

    def frequencies(
        self, head_dim: int, theta: float, trained_length: int
    ) -> tuple[np.ndarray, float]:
        """Radians per position [h/2], and the factor on cosine and sine."""
        return rope.frequencies(head_dim, theta) / self.factor, 1.0


class Llama3(Config):
    """Llama 3.1's stretch of the long waves."""

    rope_type: Literal["llama3"]
    factor: float = pydantic.Field(ge=1)
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(
        self, head_dim: int, theta: float, trained_length: int
    ) -> tuple[np.ndarray, float]:
        """Radians per position [h/2], and the factor on cosine and sine."""
        base = rope.frequencies(head_dim, theta)
        original = self.original_max_position_embeddings
        return rope.llama3_frequencies(
            base, self.factor, self.low_freq_factor, self.high_freq_factor, original
        ), 1.0


class Yarn(Config):
    """YaRN, with the attention temperature folded into cosine and sine as Hugging Face does."""

    rope_type: Literal["yarn"]
    factor: float = pydantic.Field(ge=1)
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def frequencies(
        self, head_dim: int, theta: float, trained_length: int
    ) -> tuple[np.ndarray, float]:
        """Radians per position [h/2], and the factor on cosine and sine."""
        base = rope.frequencies(head_dim, theta)
        original = self.original_max_position_embeddings or trained_length
        scale = self.attention_factor
        if scale is None:
            scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return rope.yarn_frequencies(
            base, theta, self.factor, self.beta_fast, self.beta_slow, original, self.truncate
        ), scale


Scaling = Annotated[Default | Linear | Llama3 | Yarn, pydantic.Field(discriminator="rope_type")]
TYPES = ("default", "linear", "llama3", "yarn")
