"""Writing text: prefill the prompts, then one token a step, with the compiled programs kept between
calls.

Knows no tokenizer: token ids in, token ids out.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ropewalk.core.config import Config
from ropewalk.core.errors import ModelError
from ropewalk.layers.linear import Linear
from ropewalk.layers.lm import LM, held, parameters, table, with_parameters
from ropewalk.ops.sample import logprob, sample
from ropewalk.parallel.axes import platform

# Prompts and caches are padded to powers of two from here on, so that few programs are compiled.
_SHORTEST = 32
# New tokens where nothing is said.
_NEW = 128


class Sampling(Config):
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int | None = pydantic.Field(default=None, ge=1)
    """by default 128, or as many as the longest prompt leaves positions for"""
    temperature: float = pydantic.Field(default=0.0, ge=0)
    """0 takes the most likely token every time"""
    top_k: int = pydantic.Field(default=0, ge=0, lt=2**31)
    """only the k most likely tokens; 0 = all"""
    top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
    """only the most likely tokens that together have this probability"""
    seed: int = pydantic.Field(default=0, ge=0, lt=2**32)


class Emitted(NamedTuple):
    """A new token of one sequence, and its natural log-probability."""

    row: int
    token: int
    logprob: float


class Decoder:
    """A model made ready to write: one segment a layer, so that each weight is read where it
    lies."""

    def __init__(self, model: LM):
        """Takes over `model`, a concrete module; on a device mesh its weights stay as they are
        placed."""
        self._mesh = mesh_of(model)
        model = ready(model)
        self.length = model.config.longest()
        self.vocab = model.config.vocab_size
        self._weights = parameters(model)
        self._structure = jax.eval_shape(lambda: model)
        # On a mesh every process must be able to read the tokens.
        whole = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        out = (whole, whole, whole, None)
        self._prefill = jax.jit(self._first, donate_argnums=3, out_shardings=out)
        self._decode = jax.jit(self._next, donate_argnums=1, out_shardings=out)

    def refresh(self, model: LM) -> None:
        """Takes new weights for the same structure, e.g. later in training."""
        self._weights = parameters(ready(model))

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stops: Sequence[int] = ()
    ) -> Iterator[Emitted]:
        """The new tokens, step by step.

        A sequence ends with a token of `stops` (yielded too) or at `max_new_tokens`.

        Raises ModelError for an empty prompt, a token the vocabulary lacks, or more tokens than the
        model has positions.
        """
        left = self.length - max(map(len, prompts))
        new = sampling.max_new_tokens or max(1, min(_NEW, left))
        self._check(prompts, new)
        return self._stream(prompts, new, sampling, stops)

    def _stream(
        self, prompts: Sequence[Sequence[int]], new: int, sampling: Sampling, stops: Sequence[int]
    ) -> Iterator[Emitted]:
        longest = max(map(len, prompts))
        tokens = np.zeros((len(prompts), _padded(longest)), np.int32)
        segments = np.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            segments[row, : len(prompt)] = 1
        ends = np.array([len(prompt) for prompt in prompts], np.int32)
        cache = self._cache(len(prompts), _padded(longest + new))
        each = jnp.ones(len(prompts), jnp.float32)
        knobs = (
            each * sampling.temperature,
            jnp.full(len(prompts), sampling.top_k, jnp.int32),
            each * sampling.top_p,
            each * 0,
        )
        key = jax.random.key(sampling.seed)
        step_key = jax.random.fold_in(key, 0)
        state = self._prefill(self._weights, tokens, segments, cache, ends, step_key, knobs)
        alive = [True] * len(prompts)
        for count in range(1, new + 1):
            token, score, position, cache = state
            if count < new:  # dispatched before this step's token is waited for
                step_key = jax.random.fold_in(key, count)
                state = self._decode(self._weights, cache, token, position, step_key, knobs)
            ids, scores = np.asarray(token).tolist(), np.asarray(score).tolist()
            for row in range(len(prompts)):
                if alive[row]:
                    yield Emitted(row, ids[row], scores[row])
            alive = [live and i not in stops for live, i in zip(alive, ids, strict=True)]
            if not any(alive):
                return

    def _first(self, weights, tokens, segments, cache, ends, key, knobs):
        model = with_parameters(self._structure, weights)
        x, cache, _ = model.hidden(tokens, segment_ids=segments, cache=cache)
        last = jnp.take_along_axis(x, (ends - 1)[:, None, None], axis=1)[:, 0]
        return *_drawn(model.unembed(last), key, knobs), ends, cache

    def _next(self, weights, cache, token, position, key, knobs):
        model = with_parameters(self._structure, weights)
        logits, cache, _ = model(token[:, None], position[:, None], cache=cache)
        return *_drawn(logits[:, 0], key, knobs), position + 1, cache

    def _cache(self, batch: int, length: int) -> list[Any]:
        dtype = self._weights["embed.weight"].dtype
        make = functools.partial(self._structure.init_cache, batch, min(length, self.length), dtype)
        if self._mesh is None:
            return make()
        return jax.jit(make, out_shardings=NamedSharding(self._mesh, PartitionSpec()))()

    def _check(self, prompts: Sequence[Sequence[int]], new: int) -> None:
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise ModelError(
                    f"prompt {row} has no tokens; give at least one (a tokenizer with a BOS token "
                    "adds it)"
                )
            if len(prompt) + new > self.length:
                raise ModelError(
                    f"prompt {row} has {len(prompt)} tokens and {new} new ones are asked for; the "
                    "model has "
                    f"{self.length} positions: shorten the prompt or lower max_new_tokens"
                )
            outside = [token for token in prompt if not 0 <= token < self.vocab]
            if outside:
                raise ModelError(
                    f"prompt {row} has token {outside[0]}; the model's vocabulary is 0 to "
                    f"{self.vocab - 1}"
                )


def _drawn(logits, key, knobs):
    """A token a row of logits [b, v], and its log-probability under them."""
    token = sample(logits, jax.random.uniform(key, logits.shape[:1]), *knobs)
    return token, logprob(logits, token)


@jax.jit
def ready(model: LM) -> LM:
    """The model unstacked, its weights in the dtype it computes in, and for a CPU and bfloat16 the
    way few rows read them fastest."""
    if model.embed.dtype is not None:
        weights = held(parameters(model), table(model), model.embed.dtype)
        model = with_parameters(model, weights)
    narrow = model.embed.weight[...].dtype == jnp.bfloat16
    model.layers = model.layers.unstacked()
    if narrow and platform() == "cpu":
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Linear) and not module.flipped:
                module.flip(len(module.weight.get_metadata()["axes"]))
    return model


def mesh_of(model: LM) -> Mesh | None:
    """The mesh of several devices that a model's weights lie on, if they do."""
    sharding = model.embed.weight[...].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def _padded(length: int) -> int:
    size = _SHORTEST
    while size < length:
        size *= 2
    return size
