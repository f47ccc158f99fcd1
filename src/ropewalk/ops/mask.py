"""Who may look at whom. Masks come from absolute positions and segments, never from buffer
offsets."""

import jax


def visible(
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    window: int | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """Causal visibility [b, t, s] bool: key position >= 0, not after the query, among the `window`
    last ones up to it, in the same `chunk` of so many positions, and of the same segment.

    Positions and segments are int32 [b, t] and [b, s]; a key position of -1 marks an empty place.
    """
    seen = (k_positions[:, None, :] >= 0) & (k_positions[:, None, :] <= q_positions[:, :, None])
    if window is not None:
        seen &= k_positions[:, None, :] > q_positions[:, :, None] - window
    if chunk is not None:
        seen &= k_positions[:, None, :] // chunk == q_positions[:, :, None] // chunk
    if q_segments is not None and k_segments is not None:
        seen &= q_segments[:, :, None] == k_segments[:, None, :]
    return seen
