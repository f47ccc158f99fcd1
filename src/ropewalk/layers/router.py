"""Which experts work on a token, and with what weight: a router, described by values."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ropewalk.layers.linear import INIT_STD, Buffer
from ropewalk.ops.matmul import project


@dataclasses.dataclass(frozen=True)
class Routing:
    """How experts are chosen."""

    experts: int
    top_k: int
    """experts a token"""
    score: Literal["softmax", "sigmoid"] = "softmax"
    logit_bias: bool = False
    """whether the logits have a learned bias"""
    selection_bias: bool = False
    """whether a bias that is not trained is added to the scores where experts are compared, and
    never to the weights; arXiv:2408.15664"""
    groups: int = 1
    """the experts, one after the other, in so many groups"""
    top_groups: int = 1
    """only experts of the best groups are chosen; arXiv:2405.04434 section 2.2.2"""
    group_score: Literal["best", "best_two"] = "best"
    """a group is as good as its best expert, or as its best two together"""
    renormalise: bool = False
    """whether the weights of the chosen sum to one"""
    scaling: float = 1.0
    """a factor on the weights"""
    on_input: bool = False
    """whether the weight multiplies what enters an expert, and not what leaves it"""

    def __post_init__(self) -> None:
        """Raises ValueError where there are fewer experts than are chosen or compared."""
        if self.experts % self.groups or self.top_groups > self.groups:
            raise ValueError(
                f"{self.experts} experts do not divide into {self.groups} groups of which "
                f"{self.top_groups} are kept; change n_group or topk_group"
            )
        size = self.experts // self.groups
        if self.groups > 1 and self.group_score == "best_two" and size < 2:
            raise ValueError(
                f"a group is as good as its best two experts, and each of {self.groups} groups of "
                f"{self.experts} experts has {size}; lower n_group"
            )
        within = size * self.top_groups
        if self.top_k > within:
            raise ValueError(
                f"num_experts_per_tok = {self.top_k} is more than the {within} experts to choose "
                "from; lower it"
            )


class Choice(NamedTuple):
    """expert int32 [b, t, k], their number for what is padding, which nobody works on; and weight
    float32 [b, t, k]."""

    expert: jax.Array
    weight: jax.Array


class Router(nnx.Module):
    """A product that scores every expert for a token. Everything is computed in float32."""

    def __init__(self, size: int, routing: Routing, *, rngs: nnx.Rngs):
        e = routing.experts
        self.routing = routing
        weight = INIT_STD * jax.random.normal(rngs.params(), (size, e), jnp.float32)
        self.weight = nnx.Param(weight, axes=("embed", "experts"))
        zeros = jnp.zeros(e, jnp.float32)
        self.bias = nnx.Param(zeros, axes=("experts",)) if routing.logit_bias else None
        self.selection_bias = Buffer(zeros, axes=("experts",)) if routing.selection_bias else None

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[Choice, dict[str, jax.Array]]:
        """Choices for x [b, t, d], where `real` bool [b, t] says what is no padding, and a report.

        Of every row: `router_load` [b, e], how often each expert was chosen; `router_probability`
        [b, e], sums of the scores that a token spreads over all experts; `router_z` [b], sums of
        the squared log-normalisers of the logits.
        """
        routing = self.routing
        logits = project(x.astype(jnp.float32), self.weight[...])
        if self.bias is not None:
            logits += self.bias[...].astype(jnp.float32)
        scores = _SCORES[routing.score](logits)
        # Scores that round to one (a sigmoid's) do not tie where only they are compared.
        compared = routing.selection_bias or routing.group_score == "best_two"
        rank = scores if compared else logits
        if self.selection_bias is not None:
            rank += self.selection_bias[...]
        _, expert = jax.lax.top_k(jax.lax.stop_gradient(self._within_groups(rank)), routing.top_k)
        weight = jnp.take_along_axis(scores, expert, axis=-1)
        if routing.renormalise:
            weight /= jnp.sum(weight, axis=-1, keepdims=True) + 1e-20
        choice = Choice(
            jnp.where(real[..., None], expert, routing.experts), weight * routing.scaling
        )
        return choice, _report(choice, logits, scores, real)

    def _within_groups(self, rank: jax.Array) -> jax.Array:
        """Ranks [..., e], those outside the best groups out of the question."""
        routing = self.routing
        if routing.groups == 1:
            return rank
        grouped = rank.reshape(*rank.shape[:-1], routing.groups, -1)
        best, _ = jax.lax.top_k(grouped, {"best": 1, "best_two": 2}[routing.group_score])
        _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), routing.top_groups)
        chosen = jnp.any(kept[..., None] == jnp.arange(routing.groups), axis=-2)
        return jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(rank.shape)


_SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


def _report(choice: Choice, logits: jax.Array, scores: jax.Array, real: jax.Array):
    e = logits.shape[-1]
    weight = real.astype(jnp.float32)
    chosen = choice.expert[..., None] == jnp.arange(e)
    share = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return {
        "router_load": jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32),
        "router_probability": jnp.sum(share * weight[..., None], axis=1),
        "router_z": jnp.sum(normaliser**2 * weight, axis=1),
    }
