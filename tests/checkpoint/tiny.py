"""A hand-made model for the tests of weights: rules, table, random checkpoint, all tiny."""

import math
from collections.abc import Mapping

import numpy as np

from ropewalk.checkpoint.weights import Tensor
from ropewalk.core.paths import Spec
from ropewalk.core.weights import LINEAR, LINEAR_OUT, VECTOR, Rule

LAYER, BLOCK = "model.layers.{i}.", "layers.*."
RULES = (
    Rule("model.embed_tokens.weight", "embed.weight"),
    *(
        Rule(f"{LAYER}self_attn.{theirs}_proj.{kind}", f"{BLOCK}attention.{ours}.{kind}", op, gguf)
        for theirs, ours, gguf in (
            ("q", "query", "rope_pairs"),
            ("k", "key", "rope_pairs"),
            ("v", "value", ""),
        )
        for kind, op in (("weight", LINEAR), ("bias", VECTOR))
    ),
    Rule(f"{LAYER}self_attn.o_proj.weight", f"{BLOCK}attention.out.weight", LINEAR_OUT),
    *(
        Rule(f"{LAYER}mlp.{name}_proj.weight", f"{BLOCK}mlp.{name}.weight", LINEAR)
        for name in ("gate", "up", "down")
    ),
    Rule(f"{LAYER}input_layernorm.weight", f"{BLOCK}attention_norm.scale"),
    Rule(f"{LAYER}post_attention_layernorm.weight", f"{BLOCK}mlp_norm.scale"),
    Rule("model.norm.weight", "final_norm.scale"),
    Rule("lm_head.weight", "head.weight", LINEAR, tied="model.embed_tokens.weight"),
)


def table(
    layers: int = 2, d: int = 64, n: int = 4, k: int = 2, h: int = 16, f: int = 96, v: int = 32,
    tied: bool = True, biased: bool = False, units: int = 1,
) -> dict[str, Spec]:  # fmt: skip
    """The parameters of a small decoder of `layers` repeats of a unit of `units` blocks."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (v, d), "final_norm.scale": (d,)}
    block = {
        "attention.query.weight": (d, n, h),
        "attention.key.weight": (d, k, h),
        "attention.value.weight": (d, k, h),
        "attention.out.weight": (n, h, d),
        "mlp.gate.weight": (d, f),
        "mlp.up.weight": (d, f),
        "mlp.down.weight": (f, d),
        "attention_norm.scale": (d,),
        "mlp_norm.scale": (d,),
    }
    if biased:
        block |= {
            "attention.query.bias": (n, h),
            "attention.key.bias": (k, h),
            "attention.value.bias": (k, h),
        }
    for unit in range(units):
        shapes |= {f"layers.segments.0.{unit}.{name}": (layers, *s) for name, s in block.items()}
    if not tied:
        shapes["head.weight"] = (d, v)
    return {
        path: Spec(shape, np.dtype(np.float32), (None,) * len(shape))
        for path, shape in shapes.items()
    }


def random(specs: Mapping[str, Spec], seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters by path, standard normal float32."""
    generator = np.random.default_rng(seed)
    return {
        path: generator.standard_normal(spec.shape).astype(np.float32)
        for path, spec in specs.items()
    }


def tensors(arrays: Mapping[str, np.ndarray]) -> list[Tensor]:
    """Arrays as a writer takes them."""
    return [Tensor(name, array.shape, lambda array=array: array) for name, array in arrays.items()]


def parameters(specs: Mapping[str, Spec]) -> int:
    """How many numbers a table holds."""
    return sum(math.prod(spec.shape) for spec in specs.values())
