"""Cross-entropy of every next token, weighted, and what routers are asked to keep to."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import pydantic

from ropewalk.core.config import Config
from ropewalk.core.errors import ConfigError
from ropewalk.losses import router
from ropewalk.losses.output import LossOutput, Pair
from ropewalk.ops.cross_entropy import cross_entropy


class NextToken(Config):
    """The objective of pre-training; z_loss keeps the logits' normaliser near one."""

    z_loss: float = pydantic.Field(default=0.0, ge=0)
    balance: float = pydantic.Field(default=0.0, ge=0)
    """weight of every layer's load-balancing loss, which is 1 where its experts work evenly"""
    balance_over: Literal["batch", "sequence"] = "batch"
    """where experts shall work evenly: over a micro-batch, or over each of its rows"""
    router_z: float = pydantic.Field(default=0.0, ge=0)
    """weight of every layer's mean squared normaliser of its router's logits"""

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array) -> LossOutput:
        """batch: tokens, targets, positions, segment_ids int32 [b, t] and weights float32 [b, t];
        `loss` in nats a token.

        Raises ConfigError where a router is asked for something and the model has none.
        """
        x, _, aux = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        sums = cross_entropy(
            x,
            model.head_params(),
            batch["targets"],
            batch["weights"],
            self.z_loss,
            by_row=model.head_by_row,
            soft_cap=model.logit_cap,
        )
        output = LossOutput(
            objective=Pair(sums.loss, sums.weight),
            metrics={
                "loss": Pair(sums.nats, sums.weight),
                "accuracy": Pair(sums.correct, sums.weight),
            },
        )
        return self._routed(output, aux, jnp.sum(batch["weights"], axis=1))

    def _routed(self, output: LossOutput, aux: router.Aux, rows: jax.Array) -> LossOutput:
        """With the routers' losses, in which a row counts by its weight in `rows` [b]."""
        if "router_load" not in aux:
            asked = [key for key in ("balance", "router_z") if getattr(self, key)]
            if asked:
                raise ConfigError(
                    f"objective.{asked[0]} = {getattr(self, asked[0])} and the model has no "
                    "router; remove it, or train a model with experts"
                )
            return output
        even, z = router.balance(aux, rows, self.balance_over), router.z(aux, rows)
        total, weight = output.objective
        return LossOutput(
            Pair(total + self.balance * jnp.sum(even) + self.router_z * jnp.sum(z), weight),
            {
                **output.metrics,
                "router_balance": Pair(jnp.mean(even), weight),
                "router_z": Pair(jnp.mean(z), weight),
            },
            {"router_load": jnp.sum(aux["router_load"], axis=1)},
        )
