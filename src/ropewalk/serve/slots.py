"""What the device knows of every slot beside its keys: where it stands, and how its next token is
chosen."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ropewalk.ops import sample

# Entries of a slot's fixed-size lists; what a request may have at most.
MOST_STOPS = 16
MOST_BIASES = 300
# How many of the most likely tokens are told beside the chosen one, at most.
MOST_RANKED = 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the tokens of one sequence are chosen, and when it ends."""

    limit: int
    """tokens, at least 1, after which it ends"""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    stops: Sequence[int] = ()
    """tokens that end it; at most MOST_STOPS"""
    biases: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """added to the logits of tokens; at most MOST_BIASES"""
    ranked: bool = False
    """whether the most likely tokens are told, too"""
    written: int = 0
    """tokens that it had written before, as one has that was interrupted"""

    @property
    def penalized(self) -> bool:
        """Whether it matters what was written before."""
        return bool(self.presence or self.frequency or self.repetition != 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """One row a slot, [s] or [s, ...]."""

    token: jax.Array
    """int32, the next one to be read"""
    position: jax.Array
    """int32, of that token"""
    done: jax.Array
    """bool; a slot that is done neither reads nor writes"""
    count: jax.Array
    """int32, tokens written so far"""
    limit: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    seed: jax.Array
    """uint32"""
    ranked: jax.Array
    """bool"""
    stops: jax.Array
    """int32 [s, MOST_STOPS], -1 where there is none"""
    biased: jax.Array
    """int32 [s, MOST_BIASES], tokens; beyond the vocabulary where there is none"""
    biases: jax.Array
    """float32 [s, MOST_BIASES]"""

    @property
    def penalized(self) -> jax.Array:
        """bool [s], as `Settings.penalized`."""
        return (self.presence != 0) | (self.frequency != 0) | (self.repetition != 1)

    @property
    def biased_at_all(self) -> jax.Array:
        """bool [s], whether some token has a bias."""
        return jnp.any(self.biases != 0, axis=1)

    def take(self, rows: jax.Array) -> "Slots":
        """The given rows."""
        return jax.tree.map(lambda x: x[rows], self)

    def put(self, rows: jax.Array, new: "Slots") -> "Slots":
        """With other values in some rows; a row beyond the last is dropped."""
        return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), self, new)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """What was written so far, a row a slot."""

    counts: jax.Array
    """int32 [s, v]: how often each token was written, and `PROMPTED` more where the prompt has
    it"""
    tokens: jax.Array | None
    """int32 [s, length], prompt and answer; where tokens are guessed ahead"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Tokens that were chosen, each [b] or [b, ...], with natural log-probabilities under the
    unmodified logits."""

    token: jax.Array
    logprob: jax.Array
    ranked: jax.Array
    """int32 [b, MOST_RANKED], the most likely tokens where a slot asks for them"""
    ranked_logprob: jax.Array
    emitted: jax.Array
    """bool; whether the slot wrote this token"""
    guessed: jax.Array
    """bool; whether some token had been guessed for its place"""


def rows(entries: Sequence[tuple[Settings, int]], count: int, vocab: int) -> Slots:
    """Numpy rows for settings and the position of the next token, filled up to `count`."""
    empty = Settings(limit=1)
    each = [*entries, *[(empty, 0)] * (count - len(entries))]

    def column(name: str, kind: Any) -> Any:
        return np.array([getattr(settings, name) for settings, _ in each], kind)

    def padded(values: Sequence[Any], most: int, fill: Any) -> list[Any]:
        return [*values, *[fill] * (most - len(values))]

    floats = "temperature", "top_p", "min_p", "presence", "frequency", "repetition"
    biases = [settings.biases for settings, _ in each]
    lists: dict[str, Any] = {
        "stops": np.array([padded(s.stops, MOST_STOPS, -1) for s, _ in each], np.int32),
        "biased": np.array([padded([*b], MOST_BIASES, vocab) for b in biases], np.int32),
        "biases": np.array([padded([*b.values()], MOST_BIASES, 0) for b in biases], np.float32),
    }
    return Slots(
        token=np.zeros(count, np.int32),  # pyright: ignore[reportArgumentType] (numpy's, for now)
        position=np.array([position for _, position in each], np.int32),  # pyright: ignore[reportArgumentType]
        done=np.zeros(count, bool),  # pyright: ignore[reportArgumentType]
        count=column("written", np.int32),
        limit=column("limit", np.int32),
        top_k=column("top_k", np.int32),
        seed=column("seed", np.uint32),
        ranked=column("ranked", bool),
        **{name: column(name, np.float32) for name in floats},
        **lists,
    )


def empty(slots: int, vocab: int) -> Slots:
    """Slots that are all done."""
    made = jax.tree.map(jnp.asarray, rows([], slots, vocab))
    return dataclasses.replace(made, done=jnp.ones(slots, bool))


def choose(
    logits: jax.Array,
    slots: Slots,
    counts: jax.Array,
    at: jax.Array,
    bits: jax.Array,
    constrained: jax.Array,
) -> Chosen:
    """The next token of every slot by logits float32 [b, v].

    counts [s, v] of `Written`, of which row `at` [b]; bits uint32 [b, ceil(v / 32)] of the tokens
    that a grammar allows, where `constrained`.
    """

    def chosen() -> jax.Array:
        changed = _changed(logits, slots, counts, at)
        changed = jax.lax.cond(constrained, sample.allowed, lambda x, _: x, changed, bits)
        knobs = slots.temperature, slots.top_k, slots.top_p, slots.min_p
        return sample.sample(changed, _chance(slots), *knobs)

    # Each condition costs a copy of the logits: where nobody wants anything, there is one.
    wanted = constrained | jnp.any((slots.temperature > 0) | slots.penalized | slots.biased_at_all)
    token = jax.lax.cond(wanted, chosen, lambda: sample.greedy(logits))

    def nothing() -> tuple[jax.Array, jax.Array]:
        shape = logits.shape[0], min(MOST_RANKED, logits.shape[-1])
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    ranked = functools.partial(sample.best, logits, MOST_RANKED)
    which, told = jax.lax.cond(jnp.any(slots.ranked), ranked, nothing)
    score = sample.logprob(logits, token)
    yes = jnp.ones_like(slots.done)
    return Chosen(token, score, which, told, emitted=yes, guessed=~yes)


def moved(
    own: Slots, written: Written, slot: jax.Array, chosen: Chosen, by: int
) -> tuple[Slots, Written]:
    """Rows `own` of slots int32 [b] after they wrote what was chosen for them, if it was emitted,
    `by` positions on."""
    on = chosen.emitted
    token, count = jnp.where(on, chosen.token, own.token), own.count + on
    stopped = jnp.any(own.stops == token[:, None], axis=1) | (count >= own.limit)
    position = own.position + by * on
    new = dataclasses.replace(
        own, token=token, position=position, count=count, done=own.done | (on & stopped)
    )
    row = jnp.where(on, slot, written.counts.shape[0])
    counts = written.counts.at[row, token].add(1, mode="drop")
    tokens = written.tokens
    if tokens is not None:
        tokens = tokens.at[row, position].set(token, mode="drop")
    return new, Written(counts, tokens)


PROMPTED = 1 << 24
"""added to the count of a token that the prompt has"""


def _changed(logits: jax.Array, slots: Slots, counts: jax.Array, at: jax.Array) -> jax.Array:
    """Logits with penalties and biases."""
    penalties = slots.presence, slots.frequency, slots.repetition

    def penalized() -> jax.Array:
        own = counts[at]
        written, prompted = own % PROMPTED, own >= PROMPTED
        return sample.penalized(logits, written, prompted, *penalties)

    def biased(logits: jax.Array) -> jax.Array:
        row = jnp.arange(logits.shape[0])[:, None]
        return logits.at[row, slots.biased].add(slots.biases, mode="drop")

    logits = jax.lax.cond(jnp.any(slots.penalized), penalized, lambda: logits)
    return jax.lax.cond(jnp.any(slots.biased_at_all), biased, lambda logits: logits, logits)


def _chance(slots: Slots) -> jax.Array:
    """Uniform in [0, 1), by a slot's seed and how many tokens it has written, and nothing else."""

    def one(seed: jax.Array, count: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), count))

    return jax.vmap(one)(slots.seed, slots.count)
