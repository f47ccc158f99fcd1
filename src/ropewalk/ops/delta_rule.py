"""The gated delta rule: a memory of fixed size that forgets, and writes only what it did not
know. arXiv:2412.06464

A head's state S [h_k, h_v] takes token t as

    S = exp(g_t) S                         (0 S where t is the first token of a document)
    S = S + k_t (beta_t (v_t - k_t S))
    y_t = q_t S

`recurrent` does just that; `chunked` does it for many tokens at a time with products of matrices.
Both take

    q, k        [b, t, k, h_k]; value heads share them in groups of n / k
    v           [b, t, n, h_v]
    g           float32 [b, t, n], the logarithm of the decay, at most 0
    beta        [b, t, n], how much is written
    documents   int32 [b, t], a number that changes where a document begins
    stored      bool [b, t]; where false, the token leaves the state as it is
    state       float32 [b, n, h_k, h_v], that of the document of the first token

and return y [b, t, n, h_v] in v's dtype and the state after the last token. All is computed in
float32. Nothing of one document reaches another.
"""

import functools

import jax
import jax.numpy as jnp

# Tokens of a chunk: the c x c products within it then cost half of those with its state.
CHUNK = 64
# Tokens whose chunks are made ready together, and between which a backward pass keeps the state.
_BLOCK = 256
# exp of less is no float32.
_LEAST = -104.0


def recurrent(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    documents: jax.Array,
    stored: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Token by token; a gradient keeps the state of every one."""
    first = jnp.diff(documents, axis=1, prepend=documents[:, :1]) != 0

    def step(state, token):
        q, k, v, g, beta, first = token
        decay = jnp.where(first[:, None], 0.0, jnp.exp(g))[..., None]
        # Both reads are of the state before: it is passed over twice, and written where it lies.
        read = decay[..., None] * jnp.einsum("bnxh,bnhv->bnxv", jnp.stack([k, q], axis=2), state)
        written = beta[..., None] * (v - read[:, :, 0])
        y = read[:, :, 1] + jnp.sum(q * k, axis=-1, keepdims=True) * written
        return decay[..., None] * state + k[..., :, None] * written[..., None, :], y

    tokens = *_prepared(q, k, v, g, beta, stored), first
    by_time = [jnp.swapaxes(x, 0, 1) for x in tokens]
    state, y = jax.lax.scan(step, state.astype(jnp.float32), by_time)
    return jnp.swapaxes(y, 0, 1).astype(v.dtype), state


def chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    documents: jax.Array,
    stored: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Chunks of at most 64 tokens; a gradient keeps the state of every fourth and makes the rest
    again.

    What a chunk's tokens write, w = beta (v - what is known of k), depends on the tokens before
    each: (I + T) w = beta (v - decay k S), with T the overlap of their keys (section 3.3).
    """
    b, t = documents.shape
    blocks, length = _split(t, _BLOCK)
    chunks, size = _split(length, CHUNK)

    def cut(x: jax.Array, mode: str = "constant") -> jax.Array:
        """[b, t, ...] -> [blocks, b, length, ...]"""
        pad = blocks * chunks * size - t
        x = jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)], mode)
        return jnp.swapaxes(x.reshape(b, blocks, chunks * size, *x.shape[2:]), 0, 1)

    tokens = *(cut(x) for x in (q, k, v, g, beta, stored)), cut(documents, "edge")
    block = jax.checkpoint(functools.partial(_block, chunks))
    start = state.astype(jnp.float32), documents[:, 0]
    (state, _), y = jax.lax.scan(block, start, tokens)
    return jnp.swapaxes(y, 0, 1).reshape(b, -1, *v.shape[2:])[:, :t], state


def _split(count: int, most: int) -> tuple[int, int]:
    """How many equal parts of at most `most`, and the size of one; together they may be more than
    `count`."""
    parts = -(-count // most)
    return parts, -(-count // parts)


def _prepared(q, k, v, g, beta, stored):
    """All in float32, a query and key for every value head; padding neither decays nor writes."""
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))
    q, k = (jnp.repeat(x, v.shape[2] // k.shape[2], axis=2) for x in (q, k))
    stored = stored[:, :, None]
    g = jnp.where(stored, jnp.maximum(g, _LEAST), 0.0)
    return q, k, v, g, jnp.where(stored, beta, 0.0)


def _block(chunks, carry, tokens):
    """The chunks of one block; carried are the state [b, n, h_k, h_v] and its document [b]."""
    *values, documents = tokens
    state, document = carry

    def cut(x: jax.Array, place: int) -> jax.Array:
        """[b, length, ...] -> [chunks, b, ...] with a chunk's tokens as dim `place`."""
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), (1, 2), (0, place))

    q, k, v, g, beta = _prepared(*values)
    q, k, v = (cut(x, -2) for x in (q, k, v))
    g, beta, numbers = (cut(x, -1) for x in (g, beta, documents))
    before = jnp.concatenate([document[None], numbers[:-1, :, -1]])
    ahead = _ahead(q, k, g, beta, numbers, before)
    state, y = jax.lax.scan(jax.checkpoint(_through), state, (q, k, v, *ahead))
    y = jnp.moveaxis(y, (0, -2), (1, 2)).reshape(values[2].shape)
    return (state, documents[:, -1]), y.astype(values[2].dtype)


def _ahead(q, k, g, beta, documents, before):
    """What can be said of every chunk before its state is known.

    q, k [..., n, c, h_k], g and beta [..., n, c], documents [..., c], before [...] the document
    of the state -> (I + T)^-1 beta and the weights of y on what is written, both [..., n, c, c];
    the decays of the state up to each token and from each token to the end, [..., n, c].
    """
    row, column = jnp.arange(g.shape[-1])[:, None], jnp.arange(g.shape[-1])
    same = documents[..., :, None] == documents[..., None, :]
    seen = (same & (row >= column))[..., None, :, :]
    total = jnp.sum(jnp.where(seen, g[..., None, :], 0.0), axis=-1)  # not even rounded by others
    # Differences that are not wanted may be positive: their exponentials would overflow.
    decay = jnp.exp(jnp.where(seen, total[..., :, None] - total[..., None, :], -jnp.inf))
    overlap, weights = (
        decay * jnp.einsum("...ch,...eh->...ce", x, k) for x in (beta[..., None] * k, q)
    )
    inverse = _inverse(jnp.where(row > column, overlap, 0.0)) * beta[..., None, :]
    known = (documents == before[..., None])[..., None, :]
    kept = (documents == documents[..., -1:])[..., None, :]
    into = jnp.where(known, jnp.exp(total), 0.0)
    rest = jnp.exp(jnp.where(kept, total[..., -1:] - total, -jnp.inf))
    return inverse, weights, into, rest


def _through(state, chunk):
    """One chunk: state [b, n, h_k, h_v] -> (state, y [b, n, c, h_v])."""
    q, k, v, inverse, weights, into, rest = chunk
    read = jnp.concatenate([k, q], axis=-2) @ state
    known, seen = jnp.split(read, 2, axis=-2)
    written = inverse @ (v - into[..., None] * known)
    y = into[..., None] * seen + weights @ written
    update = jnp.swapaxes(k, -1, -2) @ (rest[..., None] * written)
    return into[..., -1:, None] * state + update, y


@jax.custom_vjp
def _inverse(lower: jax.Array) -> jax.Array:
    """(I + L)^-1 of strictly lower triangular L [..., c, c]."""
    eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    # LAPACK counts down columns: what it takes and gives transposed is neither way copied.
    upper = jnp.swapaxes(lower, -1, -2)
    solved = jax.lax.linalg.triangular_solve(upper, eye, left_side=True, unit_diagonal=True)
    return jnp.swapaxes(solved, -1, -2)


def _inverse_forward(lower):
    inverse = _inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse, gradient):
    flipped = jnp.swapaxes(inverse, -1, -2)
    return (-(flipped @ gradient @ flipped),)


_inverse.defvjp(_inverse_forward, _inverse_backward)
