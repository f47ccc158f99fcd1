"""What depth costs the compiler: time and size of the training gradient's program at 48 layers over
those at 4 and at 12, by turns, for every family. Prints JSON.

A family whose kinds of layers alternate has few of them, or no loop, at 4; at 12 it has them all.

usage: python benchmarks/depth.py [FAMILY ...]      without names: every family
"""

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk import models
from ropewalk.layers.lm import parameters, with_parameters
from ropewalk.losses.next_token import NextToken

DEPTHS, TURNS = (4, 12, 48), 3
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "kv_lora_rank": 64, "q_lora_rank": 64,
    "moe_intermediate_size": 64, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "first_k_dense_replace": 0, "intermediate_size_mlp": 256,
    "shared_expert_intermediate_size": 64, "no_rope_layers": None, "layer_types": None,
    "rope_scaling": {"rope_type": "default"}, "n_group": 4, "topk_group": 2,
}  # fmt: skip


def compiled(name: str, layers: int) -> tuple[float, int]:
    """Seconds to compile the gradient, and the characters of its program before optimization."""
    family = models.family(name)
    preset = min(family.PRESETS.values(), key=lambda config: config.hidden_size)
    sizes = {key: value for key, value in SIZES.items() if key in family.Config.model_fields}
    config = family.Config.parse({**preset.model_dump(), **sizes, "num_hidden_layers": layers})
    structure = jax.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0)))

    def loss(params: dict, batch: dict) -> jax.Array:
        return NextToken()(with_parameters(structure, params), batch, jax.random.key(0)).objective[
            0
        ]

    whole = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    batch: dict = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), whole)
    batch["weights"] = jax.ShapeDtypeStruct((2, 128), jnp.float32)
    lowered = jax.jit(jax.grad(loss)).lower(parameters(structure), batch)
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start, len(lowered.as_text())


def main() -> None:
    """Measures and prints."""
    found = {}
    for name in sys.argv[1:] or models.families():
        runs: dict[int, list[tuple[float, int]]] = {layers: [] for layers in DEPTHS}
        for _ in range(TURNS):
            for layers in runs:
                jax.clear_caches()
                runs[layers].append(compiled(name, layers))
        times = {n: statistics.median(t for t, _ in each) for n, each in runs.items()}
        sizes = {n: each[0][1] for n, each in runs.items()}
        deep = DEPTHS[-1]
        found[name] = {
            "compile_s": {n: round(t, 2) for n, t in times.items()},
            "compile_ratio": {n: round(times[deep] / times[n], 3) for n in DEPTHS[:-1]},
            "size_ratio": {n: round(sizes[deep] / sizes[n], 3) for n in DEPTHS[:-1]},
        }
        print(name, found[name], file=sys.stderr)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
