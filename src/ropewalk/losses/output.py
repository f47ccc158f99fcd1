"""What a loss returns. Pairs of (sum, weight) add up: over micro-batches, hosts and evaluation
batches alike."""

import dataclasses
from typing import NamedTuple

import jax


class Pair(NamedTuple):
    """A weighted sum and the weight it is a sum over; their ratio is a mean that combines
    exactly."""

    sum: jax.Array
    weight: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOutput:
    """The objective (its mean is what is minimised) and what else is worth knowing, each a pair of
    float32 scalars; and `reports`, arrays that add up over batches: `router_load` float32 [l, e],
    how often each expert was chosen."""

    objective: Pair
    metrics: dict[str, Pair]
    reports: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
