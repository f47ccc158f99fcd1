"""A layer of experts beside a gated MLP of the same active operations, by turns: forward and
backward of both, and what each way to dispatch costs. Prints JSON.

    python benchmarks/moe.py [--tokens 2048] [--experts 8] [--top 2]
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.layers import dispatch, moe
from ropewalk.layers.attention import Context
from ropewalk.layers.mlp import GatedMLP
from ropewalk.layers.router import Routing

SIZES = ((256, 512), (256, 1024), (512, 512), (512, 1024))
WAYS = ("dropless", "dense", "capacity")
ROWS, TURNS = 4, 15


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=["dropless"], choices=WAYS)
    given = parser.parse_args()
    for dtype in ("float32", "bfloat16"):
        for size, inner in SIZES:
            print(json.dumps(compare(given, dtype, size, inner)), flush=True)


def compare(given: Any, dtype: str, size: int, inner: int) -> dict[str, Any]:
    """Median milliseconds of forward and backward, and their ratio to the MLP's."""
    rngs = nnx.Rngs(0)
    mlp = GatedMLP(size, given.top * inner, activation="silu", rngs=rngs)
    routing = Routing(given.experts, given.top, renormalise=True)
    many = moe.Experts(
        given.experts, size, inner, bias=False, active_share=1.0, out_std=0.02, rngs=rngs
    )
    layer = moe.MoE(size, many, routing, moe.gated("silu"), rngs=rngs)
    shape = ROWS, given.tokens // ROWS
    x = jax.random.normal(jax.random.key(1), (*shape, size), jnp.float32).astype(dtype)
    context = Context(jnp.zeros(shape, jnp.int32), jnp.ones(shape, jnp.int32), {})
    programs = {"mlp": program(mlp, x, context, dtype)}
    for way in given.ways:
        layer.dispatch = dispatch.choose(way, 1.25)
        programs[way] = program(layer, x, context, dtype)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(TURNS + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                times[name].append(time.perf_counter() - start)
    ms = {name: statistics.median(each) * 1e3 for name, each in times.items()}
    return {
        "dtype": dtype,
        "size": size,
        "inner": inner,
        "ms": {name: round(value, 2) for name, value in ms.items()},
        "over_mlp": {name: round(ms[name] / ms["mlp"], 3) for name in given.ways},
    }


def program(part: Any, x: jax.Array, context: Context, dtype: str) -> Any:
    """The compiled gradient of a part's weights and input, ready to be called."""
    leaves, structure = jax.tree.flatten(part)
    leaves = [leaf.astype(dtype) for leaf in leaves]

    def loss(leaves: list[jax.Array], x: jax.Array) -> jax.Array:
        y, _ = jax.tree.unflatten(structure, leaves)(x, context)
        return jnp.sum((y * x).astype(jnp.float32))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    compiled = run.lower(leaves, x).compile()
    return lambda: compiled(leaves, x)


if __name__ == "__main__":
    main()
