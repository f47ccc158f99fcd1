"""Tokens from logits: temperature, top-k, nucleus and least share of the best, a row each; and what
changes logits before that."""

import jax
import jax.numpy as jnp

# How many of the most likely tokens are ranked at first; the whole vocabulary where a cut lies
# deeper, as sorting it takes a CPU as long as a small model.
_RANKED = 64
# Tokens whose weights are added up together on the way to the one that is drawn.
_BLOCK = 256
_REMOVED = -1e30


def sample(
    logits: jax.Array,
    chance: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
) -> jax.Array:
    """Tokens int32 [b] from logits float32 [b, v]; every other argument is [b], a row's own.

    `chance`, uniform in [0, 1), says which token is drawn. temperature 0 takes the most likely one.
    Then, one after the other: the `top_k` most likely (0 = all); of them the most likely that
    together have `top_p`, arXiv:1904.09751; of all, those at least `min_p` times as likely as the
    best, arXiv:2407.01082. A token as likely as the last that is kept is kept too.
    """
    likeliest = greedy(logits)
    cut = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))

    def drawn() -> jax.Array:
        highest = jnp.max(logits, axis=-1, keepdims=True)
        scaled = (logits - highest) / jnp.maximum(temperature, 1e-6)[:, None]

        def threshold() -> jax.Array:
            return jnp.where(cut, _least(scaled, cut, top_k, top_p, min_p), -jnp.inf)

        least = jax.lax.cond(jnp.any(cut), threshold, lambda: jnp.full_like(temperature, -jnp.inf))
        weights = jnp.where(scaled >= least[:, None], jnp.exp(scaled), 0.0)
        return jnp.where(temperature > 0, _draw(weights, chance, likeliest), likeliest)

    return jax.lax.cond(jnp.any(temperature > 0), drawn, lambda: likeliest)


def greedy(logits: jax.Array) -> jax.Array:
    """The first of the most likely tokens, int32 [...], of logits [..., v]."""
    # Two plain reductions: XLA's argmax takes a CPU ten times as long.
    order = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    found = jnp.min(jnp.where(logits >= highest, order, logits.shape[-1]), axis=-1)
    return jnp.minimum(found, logits.shape[-1] - 1)


def logprob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Natural log-probabilities float32 [...] of tokens int32 [...] under logits [..., v]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def best(logits: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """The `most` most likely tokens int32 [..., most] under logits [..., v], and their natural
    log-probabilities."""
    highest, tokens = jax.lax.top_k(logits, min(most, logits.shape[-1]))
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return tokens.astype(jnp.int32), highest - total


def penalized(
    logits: jax.Array,
    written: jax.Array,
    prompted: jax.Array,
    presence: jax.Array,
    frequency: jax.Array,
    repetition: jax.Array,
) -> jax.Array:
    """Logits [b, v] less `presence` for tokens that were written and `frequency` for each time;
    those of tokens written or prompted first divided (where negative, multiplied) by `repetition`,
    arXiv:1909.05858.

    written int32 [b, v] counts, prompted bool [b, v]; the others are [b].
    """
    ratio = jnp.where((written > 0) | prompted, repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / ratio, logits * ratio)
    return logits - presence[:, None] * (written > 0) - frequency[:, None] * written


def allowed(logits: jax.Array, bits: jax.Array) -> jax.Array:
    """Logits [b, v] of the tokens whose bit is set; bits uint32 [b, ceil(v / 32)], the first token
    the lowest."""
    token = jnp.arange(logits.shape[-1], dtype=jnp.uint32)
    set_ = (bits[:, token // 32] >> (token % 32)) & 1
    return jnp.where(set_ > 0, logits, _REMOVED)


def _least(scaled, cut, top_k, top_p, min_p) -> jax.Array:
    """The lowest of each row's scaled logits that is kept, [b]; those are at most 0."""
    few = min(_RANKED, scaled.shape[-1])
    everything = jnp.sum(jnp.exp(scaled), axis=-1)
    least, found = _among(jax.lax.top_k(scaled, few)[0], everything, top_k, top_p, min_p)

    def ranked() -> jax.Array:
        return _among(-jnp.sort(-scaled, axis=-1), everything, top_k, top_p, min_p)[0]

    return jax.lax.cond(jnp.all(found | ~cut), lambda: least, ranked)


def _among(ranked, everything, top_k, top_p, min_p) -> tuple[jax.Array, jax.Array]:
    """`_least` by the m highest logits [b, m] of each row, and whether they were enough."""
    many = ranked.shape[-1]
    within = (top_k[:, None] <= 0) | (jnp.arange(many) < top_k[:, None])
    weights = jnp.where(within, jnp.exp(ranked), 0.0)
    before = jnp.cumsum(weights, axis=-1) - weights
    limited = (top_k > 0) & (top_k <= many)
    total = jnp.where(limited, jnp.sum(weights, axis=-1), everything)
    enough = (top_p < 1)[:, None] & (before >= (top_p * total)[:, None])
    lowest = jnp.log(min_p)[:, None]
    kept = (within & ~enough & (ranked >= lowest)).at[:, 0].set(True)
    least = jnp.min(jnp.where(kept, ranked, 0.0), axis=-1)
    return least, limited | ~kept[:, -1]


def _draw(weights: jax.Array, chance: jax.Array, otherwise: jax.Array) -> jax.Array:
    """The token [b] at which the running sum of weights [b, v] passes `chance` of the total."""
    b, v = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -v % _BLOCK))).reshape(b, -1, _BLOCK)
    sums = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    target = chance[:, None] * sums[:, -1:]
    block = jnp.minimum(jnp.sum(sums <= target, axis=-1), sums.shape[-1] - 1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(sums, block[:, None], axis=1) - jnp.sum(inside, -1, keepdims=True)
    place = jnp.sum(jnp.cumsum(inside, axis=-1) <= target - before, axis=-1)
    # Rounding may lead past the last token that has a weight.
    last = jnp.max(jnp.where(inside > 0, jnp.arange(_BLOCK), -1), axis=-1)
    token = block * _BLOCK + jnp.minimum(place, last)
    return jnp.where(last >= 0, token, otherwise).astype(jnp.int32)
