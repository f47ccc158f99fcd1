"""Learning rate over the steps of a run: warm-up, then constant, linear, cosine, or stable with a
decay at the end (WSD)."""

from typing import Literal

import optax
import pydantic

from ropewalk.core.config import Config
from ropewalk.core.errors import ConfigError


class Schedule(Config):
    """How the learning rate goes, in steps and in fractions of its peak."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = pydantic.Field(default=0, ge=0)
    """steps of linear rise from 0 to the peak"""
    decay_steps: int | None = pydantic.Field(default=None, ge=1)
    """wsd: steps of the final linear decay; by default a fifth of the run"""
    final: float = pydantic.Field(default=0.1, ge=0, le=1)
    """what is left of the peak at the last step"""

    def build(self, peak: float, steps: int) -> optax.Schedule:
        """step -> learning rate, for a run of `steps`. Raises ConfigError when warm-up and decay do
        not fit in it."""
        decay = steps - self.warmup_steps
        if self.kind == "wsd":
            decay = self.decay_steps or max(1, steps // 5)
        if self.warmup_steps + decay > steps or decay < 1:
            raise ConfigError(
                f"optimizer.schedule: warmup_steps = {self.warmup_steps} and a decay of "
                f"{max(decay, 1)} steps do not fit "
                f"into steps = {steps}; shorten them or lengthen the run"
            )
        rise = optax.linear_schedule(0.0, peak, self.warmup_steps)
        parts = {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, self.final * peak, decay),
            "cosine": optax.cosine_decay_schedule(peak, decay, alpha=self.final),
            "wsd": optax.linear_schedule(
                peak, self.final * peak, decay, transition_begin=steps - decay - self.warmup_steps
            ),
        }
        # Step 0 already learns: the rise counts from 1.
        return optax.join_schedules(
            [lambda step: rise(step + 1), parts[self.kind]], [self.warmup_steps]
        )
