"""A tiny model of any family, made from its `Config` alone, and the programs the suite shares.

Weights are far from their start: near it the logits are flat and a mistake would hide in rounding.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ropewalk import models
from ropewalk.core.paths import Spec
from ropewalk.layers.lm import parameters, table, with_parameters
from ropewalk.losses.next_token import NextToken
from ropewalk.parallel.axes import kind

# Divides over eight devices under every rule table; two queries share a key.
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4,
    "max_position_embeddings": 64, "sliding_window": 5, "query_pre_attn_scalar": 8,
    "attention_chunk_size": 6, "intermediate_size_mlp": 48, "moe_intermediate_size": 16,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "floor_scale": 7,
    "no_rope_layer_interval": 2, "interleave_moe_layer_step": 1, "linear_num_key_heads": 8,
    "linear_num_value_heads": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "full_attention_interval": 2,
}  # fmt: skip
# What may be zero or null: dense layers before those of experts, groups of experts, a latent of
# queries, a stretch of the positions (a preset's is for positions that these models lack).
MORE = {
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 16,
    "rope_scaling": {"rope_type": "default"}, "partial_rotary_factor": 0.5,
}  # fmt: skip
# `plain`: every boolean of the config false; `options`: every one true (biases, a tied head).
CASES = [(name, variant) for name in models.families() for variant in ("plain", "options")]
# `every`: as `plain`, all experts on every token, so that nothing jumps where a choice changes.
EVERY = {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
BATCH, LENGTH, PROMPT = 4, 24, 9
Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny model: its module's structure, its parameters, and their table."""

    family: Any
    config: Any
    structure: Any
    params: Arrays
    table: dict[str, Spec]

    def model(self, params: Arrays | None = None) -> Any:
        """The module; traceable in the parameters."""
        return with_parameters(self.structure, self.params if params is None else params)

    def running(self, run: str, remat: str) -> "Tiny":
        """The same weights run another way."""
        structure = jax.tree.map(lambda leaf: leaf, self.structure)  # a copy of the module
        structure.layers.run, structure.layers.remat = run, remat
        return dataclasses.replace(self, structure=structure)

    def loss(self, params: Arrays, batch: Arrays) -> jax.Array:
        """Mean nats a token."""
        objective = NextToken()(self.model(params), batch, jax.random.key(0)).objective
        return objective.sum / objective.weight


@functools.cache
def tiny(name: str, variant: str = "plain") -> Tiny:
    """The tiny model of a family: its smallest preset with SIZES and all booleans set."""
    family = models.family(name)
    preset = min(family.PRESETS.values(), key=lambda config: config.hidden_size)
    fields = family.Config.model_fields
    flags = {key: variant == "options" for key, f in fields.items() if f.annotation is bool}
    sizes = {**SIZES, **MORE, **(EVERY if variant == "every" else {})}
    sizes = {key: value for key, value in sizes.items() if key in fields}
    config = family.Config.parse({**preset.model_dump(), **sizes, **flags})

    def make() -> Any:
        return family.Model(config, rngs=nnx.Rngs(0))

    structure = jax.eval_shape(make)
    specs = table(structure)
    return Tiny(family, config, structure, moved(parameters(make()), specs), specs)


def moved(start: Arrays, specs: dict[str, Spec]) -> Arrays:
    """Parameters away from their start, by noise of a size that makes the logits sharp."""
    rng = np.random.default_rng(1)
    size = {"matrix": 0.2, "embedding": 0.4, "vector": 0.3}
    return {
        path: start[path] + size[kind(spec)] * rng.standard_normal(spec.shape, np.float32)
        for path, spec in specs.items()
    }


@functools.cache
def forward(name: str, variant: str) -> Any:
    """The compiled (tokens, positions, segment_ids, params = its own) -> logits of [BATCH, LENGTH],
    without cache."""
    it = tiny(name, variant)
    run = jax.jit(lambda params, *inputs: it.model(params)(*inputs)[0])

    def call(tokens: Any, positions: Any, segments: Any, params: Arrays = it.params) -> np.ndarray:
        inputs = (jnp.asarray(each, jnp.int32) for each in (tokens, positions, segments))
        return np.asarray(run(params, *inputs))

    return call


def has_experts(name: str) -> bool:
    """Whether a family routes tokens to experts."""
    return any("experts" in field for field in models.family(name).Config.model_fields)


def smooth(name: str, otherwise: str = "options") -> str:
    """The variant of a family in which no choice jumps: any, where nothing is chosen."""
    return "every" if has_experts(name) else otherwise


@functools.cache
def _cached(name: str, variant: str) -> Any:
    it = tiny(name, variant)
    return jax.jit(lambda params, cache, *inputs: it.model(params)(*inputs, cache=cache)[:2])


def cached(name: str, variant: str) -> tuple[Any, Any]:
    """The compiled (params, cache, tokens, positions, segment_ids) -> logits and cache, for PROMPT
    tokens and for one; and an empty cache of [BATCH, LENGTH]."""
    return _cached(name, variant), tiny(name, variant).model().init_cache(
        BATCH, LENGTH, jnp.float32
    )


@functools.cache
def gradient(name: str, variant: str, run: str = "scan", remat: str = "none") -> Any:
    """Loss and gradients of `batch()`, with the stack run this way."""
    return gradient_at(tiny(name, variant).params, name, variant, run, remat)


def gradient_at(
    params: Arrays, name: str, variant: str, run: str = "scan", remat: str = "none"
) -> Any:
    """The same at other parameters."""
    return _gradient(name, variant, run, remat)(params, batch())


@functools.cache
def _gradient(name: str, variant: str, run: str, remat: str) -> Any:
    return jax.jit(jax.value_and_grad(tiny(name, variant).running(run, remat).loss))


def nudged(params: Arrays) -> Arrays:
    """Parameters changed by about one rounding of a float32."""
    rng = np.random.default_rng(9)
    return {
        path: value * (1 + 1e-7 * rng.standard_normal(value.shape)).astype(np.float32)
        for path, value in params.items()
    }


@functools.cache
def rounding(name: str, variant: str) -> float:
    """How far one rounding of every parameter moves a logit: two right ways differ by as much."""
    run, inputs = forward(name, variant), (tokens(), *counted())
    moved = run(*inputs, nudged(tiny(name, variant).params))
    return float(np.abs(moved - run(*inputs)).max())


@functools.cache
def gradient_rounding(name: str, variant: str) -> dict[str, float]:
    """The same of the gradient of every parameter."""
    _, moved = gradient_at(nudged(tiny(name, variant).params), name, variant)
    _, grads = gradient(name, variant)
    return {path: float(jnp.abs(moved[path] - grad).max()) for path, grad in grads.items()}


def tokens(seed: int = 0, shape: tuple[int, ...] = (BATCH, LENGTH)) -> np.ndarray:
    """Token ids, int32."""
    high = SIZES["vocab_size"]
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.int32)


def counted(shape: tuple[int, int] = (BATCH, LENGTH)) -> tuple[np.ndarray, np.ndarray]:
    """Positions from 0 and one segment."""
    return np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape), np.ones(shape, np.int32)


def batch(rows: int = 8, length: int = 16) -> Arrays:
    """A training batch: two segments a row, then padding that weighs nothing."""
    shape = (rows, length)
    segments = np.repeat(np.array([[1] * 6 + [2] * 7 + [0] * (length - 13)], np.int32), rows, 0)
    positions = np.repeat(np.array([[*range(6), *range(7), *[0] * (length - 13)]]), rows, 0)
    weights = np.where(segments > 0, np.random.default_rng(3).choice([0.0, 0.5, 1.0], shape), 0.0)
    return {
        "tokens": jnp.asarray(tokens(1, shape)),
        "targets": jnp.asarray(tokens(2, shape)),
        "positions": jnp.asarray(positions, jnp.int32),
        "segment_ids": jnp.asarray(segments),
        "weights": jnp.asarray(weights, jnp.float32),
    }
