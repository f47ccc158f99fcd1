"""A short causal convolution of every feature by itself, over the stored tokens of a document."""

import jax
import jax.numpy as jnp


def earlier(documents: jax.Array, stored: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Where the `width` - 1 stored tokens before each token lie, nearest first, and where those lie
    that the next call is to carry, nearest last. A token that is not stored sees none.

    documents int32 [b, t], a number that changes where a document begins; stored bool [b, t]. The
    places int32 [b, t, width - 1] and [b, width - 1] count in the tokens with `width` - 1 carried
    ones, of the first document, in front; -1 where there is none of the same document.
    """
    carried = width - 1
    front = ((0, 0), (carried, 0))
    documents = jnp.pad(documents, front, "edge")
    kept = jnp.pad(stored, front, constant_values=True)
    place = jnp.broadcast_to(jnp.arange(kept.shape[1], dtype=jnp.int32), kept.shape)
    last = jax.lax.cummax(jnp.where(kept, place, 0), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))

    def back(at: jax.Array, document: jax.Array) -> jax.Array:
        found = []
        for _ in range(carried):
            same = jnp.take_along_axis(documents, at, axis=1) == document
            found.append(jnp.where(same, at, -1))
            at = jnp.take_along_axis(before, at, axis=1)
        return jnp.stack(found, axis=-1)

    each = back(before[:, carried:], documents[:, carried:])
    each = jnp.where(stored[..., None], each, -1)
    return each, back(last[:, -1:], documents[:, -1:])[:, 0, ::-1]


@jax.custom_vjp
def causal(x: jax.Array, weight: jax.Array, carried: jax.Array, places: jax.Array) -> jax.Array:
    """sum_j weight[w - 1 - j] (the j-th token before), in float32.

    x [b, t, ...], weight [..., w], carried [b, w - 1, ...], places [b, t, w - 1] of `earlier` ->
    [b, t, ...] in x's dtype.
    """
    tokens = jnp.concatenate([carried.astype(x.dtype), x], axis=1)
    y = weight[..., -1] * x.astype(jnp.float32)
    for j in range(places.shape[-1]):
        y += weight[..., -2 - j] * taken(tokens, places[..., j]).astype(jnp.float32)
    return y.astype(x.dtype)


def taken(tokens: jax.Array, places: jax.Array) -> jax.Array:
    """tokens [b, s, ...] at places int32 [b, t] -> [b, t, ...]; zeros at -1."""
    rows = jax.vmap(lambda one, at: one[at])(tokens, places)
    there = (places >= 0).reshape(*places.shape, *[1] * (tokens.ndim - 2))
    return jnp.where(there, rows, 0)


def _forward(x, weight, carried, places):
    return causal(x, weight, carried, places), (x, weight, carried, places)


def _backward(residuals, gradient):
    """A token is the j-th before one other at most: its gradient is gathered too, not scattered."""
    x, weight, carried, places = residuals
    b, t, width = *places.shape[:2], weight.shape[-1]
    tokens = jnp.concatenate([carried.astype(x.dtype), x], axis=1)
    row, order = jnp.arange(b)[:, None], jnp.arange(t, dtype=jnp.int32)
    wide = gradient.astype(jnp.float32)
    front = [(0, 0), (width - 1, 0), *[(0, 0)] * (x.ndim - 2)]
    d_tokens = jnp.pad(weight[..., -1] * wide, front)
    d_weight = [jnp.sum(x.astype(jnp.float32) * wide, axis=(0, 1))]
    for j in range(width - 1):
        at = jnp.where(places[..., j] < 0, tokens.shape[1], places[..., j])
        later = jnp.full(tokens.shape[:2], -1, jnp.int32).at[row, at].set(order, mode="drop")
        d_tokens += weight[..., -2 - j] * taken(gradient, later).astype(jnp.float32)
        seen = taken(tokens, places[..., j]).astype(jnp.float32)
        d_weight.append(jnp.sum(seen * wide, axis=(0, 1)))
    d_carried, d_x = jnp.split(d_tokens, [width - 1], axis=1)
    weights = jnp.stack(d_weight[::-1], axis=-1).astype(weight.dtype)
    return d_x.astype(x.dtype), weights, d_carried.astype(carried.dtype), None


causal.defvjp(_forward, _backward)
