"""The optimizer a recipe names: clipping, then AdamW or Muon, with weight decay by kind of
parameter."""

from collections.abc import Mapping
from typing import Literal

import optax
import pydantic

from ropewalk.core.config import Config
from ropewalk.core.paths import Spec
from ropewalk.optim import muon, router_bias
from ropewalk.optim.schedule import Schedule
from ropewalk.parallel.axes import Kind, kind


class Optimizer(Config):
    """AdamW (arXiv:1711.05101) for every parameter, or Muon for matrices and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = pydantic.Field(default=3e-4, gt=0)
    """at its peak"""
    schedule: Schedule = Schedule()
    beta1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    beta2: float = pydantic.Field(default=0.95, ge=0, lt=1)
    epsilon: float = pydantic.Field(default=1e-8, gt=0)
    weight_decay: float = pydantic.Field(default=0.1, ge=0)
    decayed: tuple[Kind, ...] = ("matrix", "embedding")
    """the kinds of parameter that decay; vectors are norm scales and biases"""
    clip: float | None = pydantic.Field(default=1.0, gt=0)
    """largest global norm of the gradient"""
    matrix_learning_rate: float | None = pydantic.Field(default=None, gt=0)
    """muon: the peak for matrices; by default the same, which its updates are scaled for"""
    router_bias_rate: float = pydantic.Field(default=0.0, ge=0)
    """how far a router's selection bias moves in a step towards experts that were chosen less often
    than others; 0 leaves it as it is"""

    def build(self, steps: int, table: Mapping[str, Spec]) -> optax.GradientTransformation:
        """The optax chain for the trained parameters `path -> array` described by `table`, over a
        run of `steps`."""
        table = {path: spec for path, spec in table.items() if spec.trained}
        rate = self.schedule.build(self.learning_rate, steps)
        mask = {path: kind(spec) in self.decayed for path, spec in table.items()}
        rule = optax.adamw(
            rate, self.beta1, self.beta2, self.epsilon, weight_decay=self.weight_decay, mask=mask
        )
        if self.kind == "muon":
            peak = self.matrix_learning_rate or self.learning_rate
            matrix_rate = self.schedule.build(peak, steps)
            rule = muon.build(matrix_rate, rule, self.epsilon, self.weight_decay, mask, table)
        clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
        return optax.chain(clip, rule)

    def post_update(self, table: Mapping[str, Spec]) -> router_bias.Update:
        """What an update does beside: (weights that no gradient moves, the loss's reports) -> those
        weights. Raises ConfigError where the model has nothing that `router_bias_rate` could
        move."""
        return router_bias.build(self.router_bias_rate, table)
