"""Rematerialisation by name: what a block keeps for its backward pass and what it computes
again."""

from collections.abc import Callable
from typing import Any, Literal

import jax

Remat = Literal["none", "full", "dots", "dots_no_batch"]

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def wrap(function: Callable[..., Any], name: Remat, in_scan: bool) -> Callable[..., Any]:
    """`function` with its activations kept (`none`), recomputed (`full`), or all but its products
    recomputed (`dots`).

    `dots_no_batch` keeps the products with parameters and recomputes attention. Inside a scan, the
    loop itself keeps XLA from merging the recomputation with the first computation, so no barrier
    is needed.
    """
    if name == "none":
        return function
    return jax.checkpoint(function, policy=_POLICIES[name], prevent_cse=not in_scan)
