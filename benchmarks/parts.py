"""Where a train step spends its time: forward, backward, loss, optimizer, and the whole, each
compiled alone."""

import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ropewalk.layers.lm import parameters, with_parameters
from ropewalk.metrics.meter import peak_flops
from ropewalk.ops.cross_entropy import cross_entropy
from ropewalk.train import build, run, state


def parts(recipe: Path, precision: str) -> dict[str, Any]:
    """Milliseconds of each part, and its products' FLOP/s over the measured rate of one product."""
    settings = run.read(recipe, [f"precision={precision}", "directory=/tmp/ropewalk-parts"])
    built = build.build(settings)
    made, _ = state.build(built.fresh, built.table, built.placement)
    batch = built.place(next(built.batches).arrays)
    built.batches.close()
    dtype = settings.compute_dtype
    params = {path: value.astype(dtype) for path, value in made.params.items()}
    size, length = settings.data.batch_size, settings.data.length
    tokens, config = size * length, built.named.config
    head = 2 * tokens * config.hidden_size * config.vocab_size
    body = built.structure.flops(tokens, length) - head
    rate = peak_flops(jax.devices()[0], dtype).flops

    def hidden(params: dict[str, jax.Array]) -> jax.Array:
        model = with_parameters(built.structure, params)
        return model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])[0]

    def loss(x: jax.Array, head: jax.Array) -> jax.Array:
        return cross_entropy(x, head, batch["targets"], batch["weights"]).loss

    x = jax.jit(hidden)(params)
    weight = with_parameters(built.structure, params).head_params()
    forward = timed(hidden, params)
    both = timed(jax.grad(lambda p: jnp.sum(hidden(p).astype(jnp.float32))), params)
    made_loss = timed(jax.grad(loss, argnums=(0, 1)), x, weight)
    update = timed(
        lambda g, s, p: built.optimizer.update(g, s, p), made.params, made.opt_state, made.params
    )
    step = built.compile_step()
    times = []
    for _ in range(8):
        start = time.perf_counter()
        made, metrics = step(made, batch)
        jax.block_until_ready((made, metrics))
        times.append(time.perf_counter() - start)
    whole = statistics.median(times[1:])
    rows = {
        "forward": (forward, body),
        "backward": (both - forward, 2 * body),
        "loss": (made_loss, 3 * head),
    }
    return {
        "product_gflop_s": round(rate / 1e9),
        **{
            name: {"ms": round(s * 1e3, 1), "of_product_rate": round(flops / s / rate, 3)}
            for name, (s, flops) in rows.items()
        },
        "optimizer": {"ms": round(update * 1e3, 1)},
        "step": {
            "ms": round(whole * 1e3, 1),
            "of_product_rate": round(3 * (body + head) / whole / rate, 3),
        },
        "parameters": sum(value.size for value in parameters(built.structure).values()),
    }


def timed(function: Any, *arguments: Any) -> float:
    """Median seconds of a compiled call, of seven."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)
