"""One update: gradients of a sum over its weight, accumulated in float32 over micro-batches;
dropped whole when not finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ropewalk.layers.lm import with_parameters
from ropewalk.losses.output import LossOutput
from ropewalk.losses.router import max_load
from ropewalk.parallel.axes import Placement, placed
from ropewalk.train.state import State

Batch = dict[str, jax.Array]
Loss = Callable[[Any, Batch, jax.Array], LossOutput]
Step = Callable[[State, Batch], tuple[State, dict[str, Any]]]
Arrays = dict[str, jax.Array]
PostUpdate = Callable[[Arrays, Arrays], Arrays]


def make_step(
    structure: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    *,
    rate: optax.Schedule,
    accumulate: int,
    seed: int,
    post_update: PostUpdate = lambda frozen, reports: frozen,
) -> Step:
    """The step `(state, batch) -> (state, metrics)`, to be jitted; batch arrays are [b, t].

    `structure` is the abstract model. A batch is cut into `accumulate` micro-batches whose gradient
    sums are divided once by the weight of all, so that they give the gradient of one batch. `rate`
    is the schedule that `optimizer` follows, and is only reported. `post_update` makes the weights
    that no gradient moves from those before and what the loss of the whole batch reports.
    """

    def sums(params: Arrays, frozen: Arrays, batch: Batch, key: jax.Array):
        output = loss(with_parameters(structure, params | frozen), batch, key)
        return output.objective.sum, output

    def gradient(params, frozen, batch, key):
        (_, output), grads = jax.value_and_grad(sums, has_aux=True)(params, frozen, batch, key)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), output

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        with placed(placement):
            params, frozen = state.params, state.frozen
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            if accumulate == 1:
                grads, output = gradient(params, frozen, batch, key)
            else:
                grads, output = _accumulated(gradient, params, frozen, _cut(batch, accumulate), key)
            scale = 1.0 / jnp.maximum(output.objective.weight, 1e-8)
            grads = jax.tree.map(lambda g: g * scale, grads)
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(output.objective.sum) & jnp.isfinite(norm)
            good = finite & (output.objective.weight > 0)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            new = optax.apply_updates(state.params, updates)
            params, frozen, opt_state = jax.tree.map(
                lambda a, b: jnp.where(good, a, b),
                (new, post_update(frozen, output.reports), opt_state),
                (state.params, state.frozen, state.opt_state),
            )
            bad = (~finite).astype(jnp.int32)
            extra = {
                **state.extra,
                "skipped": state.extra["skipped"] + bad,
                "skipped_in_a_row": (state.extra["skipped_in_a_row"] + 1) * bad,
            }
            metrics = {**output.metrics, "grad_norm": norm, **extra}
            metrics["learning_rate"] = rate(state.step - state.extra["skipped"])
            if "router_load" in output.reports:
                metrics["router_max_load"] = max_load(output.reports["router_load"])
            return State(params, frozen, opt_state, state.step + 1, extra), metrics

    return step


def _cut(batch: Batch, parts: int) -> Batch:
    """[b, t] -> [parts, b / parts, t]; part i takes every parts-th row, so that each stays spread
    over all devices."""
    return {
        name: jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1) for name, a in batch.items()
    }


def _accumulated(gradient, params, frozen, batches, key):
    def body(total, part):
        index, batch = part
        return jax.tree.map(
            jnp.add, total, gradient(params, frozen, batch, jax.random.fold_in(key, index))
        ), None

    parts = jax.tree.leaves(batches)[0].shape[0]
    one = jax.tree.map(lambda a: a[0], batches)
    start = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, params, frozen, one, key)
    )
    return jax.lax.scan(body, start, (jnp.arange(parts), batches))[0]
