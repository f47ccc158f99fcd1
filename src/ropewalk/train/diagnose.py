"""Where the numbers stop being finite: the first part of the forward pass, or the last whose
gradient is not."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ropewalk.layers.lm import with_parameters
from ropewalk.layers.stack import depth
from ropewalk.train.step import Batch, Loss


def first_bad(structure: Any, loss: Loss, params: dict[str, jax.Array], batch: Batch) -> str:
    """One phrase naming the first part whose output, weight or gradient is not finite, computed as
    the step does. Runs block by block, uncompiled."""
    bad = [path for path, value in params.items() if not _finite(value)]
    if bad:
        return f"the weight `{bad[0]}` is not finite"
    model = with_parameters(structure, params)
    ctx = model.context(batch["positions"], batch["segment_ids"])
    x = model.embedded(batch["tokens"], batch["positions"])
    for index in range(depth(model.layers)):
        x, _, _ = model.layers.layer(index)(x, ctx)
        if not _finite(x):
            return f"the output of layer {index} is the first that is not finite"
    if not _finite(model.unembed(model.final_norm(x))):
        return "the layers are finite and the logits are not"

    def total(values: dict[str, jax.Array]) -> jax.Array:
        return loss(with_parameters(structure, values), batch, jax.random.key(0)).objective.sum

    value, grads = jax.jit(jax.value_and_grad(total))(params)
    if not _finite(value):
        return "the logits are finite and the loss is not"
    bad = [path for path, grad in grads.items() if not _finite(grad)]
    if not bad:
        if _finite(optax.tree.norm({path: g.astype(jnp.float32) for path, g in grads.items()})):
            return "with the last good weights the batch is finite now"
        largest = max(grads, key=lambda path: float(jnp.abs(grads[path]).max()))
        return f"every gradient is finite and their norm is not; the largest is that of `{largest}`"
    count = f"{len(bad)} of {len(grads)} are not"
    return f"the forward pass is finite and the gradient of `{_latest(bad)}` is not ({count})"


def _latest(paths: list[str]) -> str:
    """The one nearest the loss, where the backward pass begins."""
    order = ("head", "final_norm", "layers", "embed")
    return min(
        paths,
        key=lambda path: (
            order.index(path.split(".")[0]) if path.split(".")[0] in order else 0,
            path,
        ),
    )


def _finite(value: Any) -> bool:
    return bool(jnp.all(jnp.isfinite(value)))
