"""Visibility against its definition, pair by pair."""

import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.ops import mask


@pytest.mark.parametrize("window", [None, 1, 3])
def test_equals_the_definition(window):
    q = np.array([[0, 1, 2, 0, 1, 5]])
    q_segments = np.array([[1, 1, 1, 2, 2, 2]])
    k = np.array([[0, 1, 2, 0, 1, 5, -1]])
    k_segments = np.array([[1, 1, 1, 2, 2, 2, 2]])
    q_at, k_at, q_of, k_of = (jnp.asarray(a, jnp.int32) for a in (q, k, q_segments, k_segments))
    seen = mask.visible(q_at, k_at, q_of, k_of, window)
    for t, s in np.ndindex(q.size, k.size):
        back = q[0, t] - k[0, s]
        near = window is None or back < window
        same = q_segments[0, t] == k_segments[0, s]
        assert bool(seen[0, t, s]) == (k[0, s] >= 0 and back >= 0 and near and same)
