"""The language model around a stack of blocks: tokens in, logits out, one forward for training,
prefill and decoding."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.core.paths import Spec, dotted
from ropewalk.layers.attention import Context, Turn
from ropewalk.layers.config import LMConfig
from ropewalk.layers.embedding import Embedding
from ropewalk.layers.linear import Linear
from ropewalk.layers.stack import Stack, Unit
from ropewalk.ops.matmul import project, project_rows
from ropewalk.parallel.axes import Kind, kind, shard


class LM(nnx.Module):
    """Embedding, stack, final norm and output head. A family's `Model` says what the stack is made
    of."""

    def __init__(self, config: LMConfig, plan: Sequence[tuple[Unit, int]], *, rngs: nnx.Rngs):
        self.config = config
        self.rotations = tuple(config.rotations().items())
        self.embed_scale = config.embed_scale()
        self.logit_cap = config.logit_cap()
        self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.positions = (
            Embedding(config.max_position_embeddings, config.hidden_size, "positions", rngs=rngs)
            if config.learned_positions
            else None
        )
        self.layers = Stack(plan, rngs=rngs)
        self.final_norm = config.norm()
        tied = config.tie_word_embeddings
        self.head = (
            None
            if tied
            else Linear((config.hidden_size,), (config.vocab_size,), ("embed", "vocab"), rngs=rngs)
        )

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Sequence[Any] | None = None,
    ) -> tuple[jax.Array, list[Any] | None, dict[str, jax.Array]]:
        """Final hidden states [b, t, d] of tokens int32 [b, t], the written cache (or None), and
        the layers' reports.

        Without positions they count from 0; without segment_ids every token is of segment 1 (0 =
        padding).
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        x = shard(self.embedded(tokens, positions), "batch", "time", "hidden")
        x, cache, aux = self.layers(x, self.context(positions, segment_ids), cache)
        return self.final_norm(x), cache, aux

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """What enters the first layer, [b, t, d], of tokens at positions int32 [b, t]."""
        x = self.embed(tokens)
        if self.positions is not None:
            x += self.positions(positions).astype(x.dtype)
        scale = self.embed_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def context(self, positions: jax.Array, segment_ids: jax.Array) -> Context:
        """What all layers share at these positions and segments, int32 [b, t]."""
        turns = {}
        for name, rotation in self.rotations:
            # A barrier, or XLA takes the cosine and sine of every angle anew in every layer.
            cos, sin = jax.lax.optimization_barrier(rotation.angles(positions))
            turns[name] = Turn(cos, sin, rotation.interleaved)
        return Context(positions, segment_ids, turns)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Logits float32 [..., v] of hidden states [..., d]."""
        product = project_rows if self.head_by_row else project
        logits = product(x, self.head_params()).astype(jnp.float32)
        cap = self.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def head_params(self) -> jax.Array:
        """The output head as it is stored: [v, d] where `head_by_row`, else [d, v].

        It is all that `unembed` needs, for losses that tile the vocabulary or the tokens.
        """
        return self.embed.weight[...] if self.head is None else self.head.weight[...]

    @property
    def head_by_row(self) -> bool:
        """Whether the head has a row a token: a tied embedding does."""
        return self.head is None or self.head.flipped

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Sequence[Any] | None = None,
    ) -> tuple[jax.Array, list[Any] | None, dict[str, jax.Array]]:
        """`hidden`, then `unembed`: (logits [b, t, v], cache, aux)."""
        x, cache, aux = self.hidden(tokens, positions, segment_ids, cache)
        return self.unembed(x), cache, aux

    def init_cache(self, batch: int, length: int, dtype: Any) -> list[Any]:
        """One empty cache a layer, with room for `length` tokens of each of `batch` sequences."""
        return [block.attention.init_cache(batch, length, dtype) for block in self.layers.blocks()]

    def flops(self, tokens: int, length: int) -> float:
        """Floating-point operations of one forward pass over `tokens` tokens in causal sequences of
        `length`.

        Two for every weight of a product and token, and what attention does beside: of its scores
        and values, those that a token sees.
        """
        matrices = self.active(only="matrix") + self.config.vocab_size * self.config.hidden_size
        mixing = sum(block.attention.mixing_flops(length) for block in self.layers.blocks())
        return float(tokens) * (2 * matrices + mixing)

    def active(self, only: Kind | None = None) -> float:
        """How many parameters (of one kind) work on a token: of experts, those that it is sent
        to."""
        shares = {
            f"{'.'.join(map(str, path))}.": float(getattr(module, "active_share", 1.0))
            for path, module in nnx.iter_modules(self)
        }
        total = 0.0
        for path, spec in table(self).items():
            if only in (None, kind(spec)):
                share = min(s for at, s in shares.items() if path.startswith(at) or at == ".")
                total += share * math.prod(spec.shape)
        return total


def parameters(model: nnx.Module) -> dict[str, Any]:
    """Every parameter's value (or abstract shape) by path."""
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def table(model: nnx.Module) -> dict[str, Spec]:
    """The static table path -> shape, dtype, axes that shardings, checkpoints, optimizers and
    weights are read from.

    A parameter of a stacked block has `layers` in front of the axes it was made with.
    """
    variables = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    specs = {}
    for path, variable in variables:
        value, axes = variable.get_value(), tuple(variable.get_metadata()["axes"])
        stacked = ("layers",) * (len(value.shape) - len(axes))
        kind_, trained = jnp.dtype(value.dtype), isinstance(variable, nnx.Param)
        specs[dotted(path)] = Spec(tuple(value.shape), kind_, stacked + axes, trained)
    return specs


def held(values: Mapping[str, Any], specs: Mapping[str, Spec], dtype: Any) -> dict[str, Any]:
    """The values by path as a model held in `dtype` has them."""
    return {path: value.astype(specs[path].held_in(dtype)) for path, value in values.items()}


def with_parameters(model: nnx.Module, values: dict[str, Any]) -> Any:
    """A module of the same structure that holds the given values. Raises KeyError for a missing
    path."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    return jax.tree_util.tree_unflatten(structure, [values[dotted(path)] for path, _ in leaves])
