"""The caches against a table kept in plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.layers.cache import Dense, Ring

B, S, K, H = 2, 6, 2, 3
SHAPES = [(K, H), (K, H)]


def test_dense_holds_what_was_written_where_it_was_written():
    rng = np.random.default_rng(0)
    cache = Dense.empty(B, S, SHAPES, jnp.float32)
    kept: dict[tuple[int, int], np.ndarray] = {}
    for t in (3, 1, 2):
        new = rng.standard_normal((2, B, t, K, H)).astype(np.float32)
        positions = np.stack([rng.permutation(S)[:t] for _ in range(B)]).astype(np.int32)
        stored = rng.random((B, t)) < 0.7
        cache, buffers, places = cache.extend(
            tuple(new), jnp.asarray(positions), jnp.asarray(stored)
        )
        for row, i in zip(*np.nonzero(stored), strict=True):
            kept[int(row), int(positions[row, i])] = new[:, row, i]
    for row, place in np.ndindex(B, S):
        assert places[row, place] == (place if (row, place) in kept else -1)
        if (row, place) in kept:
            found = [buffer[row, place] for buffer in buffers]
            np.testing.assert_array_equal(found, kept[row, place])
    assert 0 < len(kept) < B * S


@pytest.mark.parametrize("sizes", [(1,) * 20, (9, 1, 1, 4, 1, 2, 1, 1), (3, 14, 1, 1)])
def test_a_ring_shows_every_query_its_window_and_holds_no_more(sizes):
    rng, window = np.random.default_rng(1), 4
    cache = Ring.empty(B, window, SHAPES, jnp.float32)
    kept: list[dict[int, np.ndarray]] = [{} for _ in range(B)]
    for t in sizes:
        new = rng.standard_normal((2, B, t, K, H)).astype(np.float32)
        # Row 0 has padding on the right, row 1 on the left.
        real = rng.integers(1, t + 1, B)
        stored = np.stack([np.arange(t) < real[0], np.arange(t) >= t - real[1]])
        first = np.array([[len(kept[0])], [len(kept[1])]])
        positions = np.where(stored, first + np.cumsum(stored, axis=1) - 1, 0).astype(np.int32)
        cache, buffers, there = cache.extend(
            tuple(new), jnp.asarray(positions), jnp.asarray(stored)
        )
        for row, i in zip(*np.nonzero(stored), strict=True):
            kept[row][int(positions[row, i])] = new[:, row, i]
        for row, i in zip(*np.nonzero(stored), strict=True):
            query = int(positions[row, i])
            for wanted in range(max(0, query - window + 1), query + 1):
                (at,) = np.flatnonzero(there[row] == wanted)
                found = [buffer[row, at] for buffer in buffers]
                np.testing.assert_array_equal(found, kept[row][wanted])
    assert all(buffer.shape == (B, K, window, H) for buffer in cache.buffers)
    assert max(map(len, kept)) > 2 * window


@pytest.mark.parametrize("kind", [Dense, Ring])
def test_padding_at_position_zero_does_not_replace_the_first_token(kind):
    first = jnp.ones((1, 1, K, H))
    zero, yes, no = jnp.zeros((1, 1), jnp.int32), jnp.array([[True]]), jnp.array([[False]])
    cache, before, _ = kind.empty(1, S, SHAPES, jnp.float32).extend((first, first), zero, yes)
    _, after, places = cache.extend((9 * first, 9 * first), zero, no)
    for mine, theirs in zip(after, before, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert places[0].tolist() == [0, -1, -1, -1, -1, -1]


def test_keeps_its_own_dtype():
    cache = Dense.empty(1, S, SHAPES, jnp.bfloat16)
    new = jnp.full((1, 1, K, H), 1.001)
    _, (keys, _), _ = cache.extend((new, new), jnp.zeros((1, 1), jnp.int32), jnp.array([[True]]))
    assert keys.dtype == jnp.bfloat16 and keys[0, 0, 0, 0] == 1.0
