"""Cross-entropy of every next token, weighted."""

from typing import Any

import jax
import pydantic

from ropewalk.core.config import Config
from ropewalk.losses.output import LossOutput, Pair
from ropewalk.ops.cross_entropy import cross_entropy


class NextToken(Config):
    """The objective of pre-training; z_loss keeps the logits' normaliser near one."""

    z_loss: float = pydantic.Field(default=0.0, ge=0)

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array) -> LossOutput:
        """batch: tokens, targets, positions, segment_ids int32 [b, t] and weights float32 [b, t];
        `loss` in nats a token."""
        x, _, _ = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        sums = cross_entropy(
            x,
            model.head_params(),
            batch["targets"],
            batch["weights"],
            self.z_loss,
            by_row=model.head_by_row,
            soft_cap=model.logit_cap,
        )
        return LossOutput(
            objective=Pair(sums.loss, sums.weight),
            metrics={
                "loss": Pair(sums.nats, sums.weight),
                "accuracy": Pair(sums.correct, sums.weight),
            },
        )
