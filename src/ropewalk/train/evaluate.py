"""The held-out split: loss, perplexity, accuracy, and bits per byte, which compares across
tokenizers."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ropewalk.data.stats import Batch
from ropewalk.layers.lm import with_parameters
from ropewalk.losses.output import Pair
from ropewalk.metrics.meter import Means
from ropewalk.parallel.axes import Placement, placed
from ropewalk.train.step import Loss

MEASURES = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_accuracy")

Place = Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]


class Evaluator:
    """Compiled once, called with the weights of any step."""

    def __init__(
        self,
        structure: Any,
        loss: Loss,
        placement: Placement,
        batches: Iterable[Batch],
        token_bytes: np.ndarray,
    ):
        self._batches = batches
        self._token_bytes = token_bytes

        def sums(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, Pair]:
            with placed(placement):
                output = loss(with_parameters(structure, params), batch, jax.random.key(0))
                sizes = jnp.sum(batch["bytes"] * (batch["weights"] > 0))
                return {**output.metrics, "bytes": Pair(sizes, output.objective.weight)}

        self._sums = jax.jit(sums)

    def __call__(self, params: dict[str, jax.Array], place: Place) -> dict[str, float]:
        """eval_loss (nats a token), eval_perplexity, eval_accuracy, eval_bits_per_byte over the
        whole split."""
        total = Means()
        for batch in self._batches:
            arrays = dict(batch.arrays)
            arrays["bytes"] = self._token_bytes[arrays["targets"]].astype(np.float32)
            total.add(jax.device_get(self._sums(params, place(arrays))))
        means = total.values()
        loss, size = means.pop("loss"), means.pop("bytes")
        return {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700.0)),
            "eval_bits_per_byte": loss / (size * math.log(2)) if size else math.nan,
            **{f"eval_{name}": value for name, value in means.items()},
        }
