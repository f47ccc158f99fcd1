"""One token from logits: temperature, top-k, nucleus; and its log-probability."""

import jax
import jax.numpy as jnp


def sample(
    logits: jax.Array, key: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [b] and their natural log-probabilities float32 [b] under the unmodified logits
    [b, v].

    temperature 0 takes the most likely token. top_k = 0 and top_p = 1 leave the distribution whole;
    arXiv:1904.09751.
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits, axis=-1)

    def drawn() -> jax.Array:
        scaled = logits / jnp.maximum(temperature, 1e-6)
        order = jnp.argsort(-scaled, axis=-1)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        chances = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(chances, axis=-1) - chances
        rank = jnp.arange(logits.shape[-1])
        kept = (before < top_p) & ((top_k <= 0) | (rank < top_k))
        choice = jax.random.categorical(key, jnp.where(kept.at[:, 0].set(True), ranked, -jnp.inf))
        return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]

    token = jax.lax.cond(temperature > 0, drawn, lambda: greedy).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)
