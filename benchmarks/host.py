"""Host time of a train step: the call a run makes beside the same program as a bare `jax.jit` on
flat leaves, by turns.

    python benchmarks/host.py

The model is so small that the call is most of the time.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from ropewalk.train import build, run, state

SMALL = [
    "model={family: llama, vocab_size: 64, hidden_size: 8, intermediate_size: 8, "
    "num_hidden_layers: 2, num_attention_heads: 1}",
    "data.sources=[{synthetic: {vocab_size: 64}}]",
    "data.batch_size=1",
    "data.length=8",
]
CALLS, TURNS = 200, 9


def main() -> None:
    """Prints microseconds a call of both, and the median ratio of turns side by side."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(__file__).parent / "train_step.yml"
        built = build.build(run.read(recipe, [*SMALL, f"directory={scratch}/run"]))
    made, _ = state.build(built.fresh, built.table, built.placement)
    batch = built.place(next(built.batches).arrays)
    built.batches.close()
    step = built.compile_step()
    leaves, structure = jax.tree.flatten(made)
    inputs, names = jax.tree.flatten(batch)

    def flat(*arrays: jax.Array):
        state, rows = arrays[: len(leaves)], arrays[len(leaves) :]
        new, metrics = built.step()(
            jax.tree.unflatten(structure, state), jax.tree.unflatten(names, rows)
        )
        return *jax.tree.leaves(new), *jax.tree.leaves(metrics)

    bare = jax.jit(flat, donate_argnums=tuple(range(len(leaves))))
    carried = [leaf.copy() for leaf in leaves]

    def of_ours() -> None:
        nonlocal made
        made, _ = step(made, batch)

    def of_bare() -> None:
        nonlocal carried
        carried = list(bare(*carried, *inputs)[: len(leaves)])

    turns = [(seconds(of_ours), seconds(of_bare)) for _ in range(TURNS)][1:]
    ours, theirs = (statistics.median(side) for side in zip(*turns, strict=True))
    print(
        json.dumps(
            {
                "leaves": len(leaves),
                "ours_us": round(ours * 1e6, 1),
                "bare_us": round(theirs * 1e6, 1),
                "ratio": round(statistics.median(a / b for a, b in turns), 3),
            }
        )
    )


def seconds(call: Callable[[], None]) -> float:
    """Seconds a call, over many."""
    begun = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begun) / CALLS


if __name__ == "__main__":
    main()
