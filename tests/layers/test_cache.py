"""The dense cache against a table kept in plain Python."""

import jax.numpy as jnp
import numpy as np

from ropewalk.layers.cache import Dense

B, S, K, H = 2, 6, 2, 3


def test_holds_what_was_written_where_it_was_written():
    rng = np.random.default_rng(0)
    cache = Dense.empty(B, S, K, H, jnp.float32)
    kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for t in (3, 1, 2):
        keys, values = rng.standard_normal((2, B, t, K, H)).astype(np.float32)
        positions = np.stack([rng.permutation(S)[:t] for _ in range(B)]).astype(np.int32)
        stored = rng.random((B, t)) < 0.7
        cache = cache.write(*map(jnp.asarray, (keys, values, positions, stored)))
        for row, i in zip(*np.nonzero(stored), strict=True):
            kept[int(row), int(positions[row, i])] = (keys[row, i], values[row, i])
    keys, values, positions = cache.read()
    for row, place in np.ndindex(B, S):
        assert positions[row, place] == (place if (row, place) in kept else -1)
        if (row, place) in kept:
            np.testing.assert_array_equal(keys[row, place], kept[row, place][0])
            np.testing.assert_array_equal(values[row, place], kept[row, place][1])
    assert 0 < len(kept) < B * S


def test_padding_at_position_zero_does_not_replace_the_first_token():
    first = jnp.ones((1, 1, K, H))
    zero, yes, no = jnp.zeros((1, 1), jnp.int32), jnp.array([[True]]), jnp.array([[False]])
    cache = Dense.empty(1, S, K, H, jnp.float32).write(first, first, zero, yes)
    after = cache.write(9 * first, 9 * first, zero, no)
    for mine, theirs in zip(after.read(), cache.read(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_keeps_its_own_dtype():
    cache = Dense.empty(1, S, K, H, jnp.bfloat16)
    new = jnp.full((1, 1, K, H), 1.001)
    keys, _, _ = cache.write(new, new, jnp.zeros((1, 1), jnp.int32), jnp.array([[True]])).read()
    assert keys.dtype == jnp.bfloat16 and keys[0, 0, 0, 0] == 1.0
