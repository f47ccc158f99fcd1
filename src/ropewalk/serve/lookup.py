"""Guesses from what was written before: what followed the last tokens when they stood there last
time. arXiv:2304.04487"""

import jax
import jax.numpy as jnp

# Tokens that are compared at most; a place where more of them agree is believed sooner.
_RUN = 4


def lookup(tokens: jax.Array, last: jax.Array, count: int) -> jax.Array:
    """Tokens int32 [b, count] that may follow the one at `last` int32 [b] of tokens int32 [b, s];
    -1 where the one at `last` never stood there before.

    A text that repeats itself goes on repeating.
    """
    place, last = jnp.arange(tokens.shape[1]), last[:, None]
    run = jnp.zeros(tokens.shape, jnp.int32)
    same = place < last
    for back in range(_RUN):
        one = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0), axis=1)
        same = same & (jnp.roll(tokens, back, axis=1) == one) & (place >= back)
        run += same
    # The latest of the longest.
    score = jnp.where(run > 0, run * tokens.shape[1] + place, -1)
    at = jnp.argmax(score, axis=1)[:, None]
    following = at + 1 + jnp.arange(count) % jnp.maximum(last - at, 1)
    found = jnp.take_along_axis(tokens, following, axis=1)
    return jnp.where(jnp.max(score, axis=1, keepdims=True) >= 0, found, -1)
