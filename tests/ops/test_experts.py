"""The loops of a CPU against ragged products, which know no piece of an expert's rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.ops import experts as ops
from ropewalk.ops.experts import Rows, Weights, experts

D, F, K = 8, 12, 2


def act(gate, up):
    return jax.nn.silu(gate) * (up + 1)


def given(sizes, nobody=0, bias=True, expanded=False, seed=0):
    """Rows in a random order; the last `nobody` choices are nobody's."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    m, e = sum(sizes) + nobody, len(sizes)
    order = rng.permutation(m)  # row -> choice
    place = np.argsort(order).reshape(-1, K)
    n = m // K
    source = order if expanded else order // K
    whole = [jnp.asarray(a, jnp.int32) for a in (source, sizes, place)]
    matrices = normal(e, D, F), normal(e, D, F), normal(e, F, D)
    biases = (normal(e, F), normal(e, F), normal(e, D)) if bias else ()
    return normal(m if expanded else n, D), Weights(*matrices, *biases), normal(n, K), Rows(*whole)


def run(x, weights, share, rows):
    def mixture(x, weights, share):
        y = experts(x, weights, share, rows, act)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    gradients = jax.jit(jax.value_and_grad(mixture, argnums=(0, 1, 2), has_aux=True))
    (_, y), found = gradients(x, weights, share)
    return y, found


CASES = {
    "even": {"sizes": (16, 16, 16, 16)},
    "uneven": {"sizes": (0, 97, 1, 0, 30, 8, 0)},
    "one": {"sizes": (0, 0, 64), "bias": False},
    "nobody": {"sizes": (5, 0, 10), "nobody": 7},
    "few": {"sizes": (0, 1, 0, 0, 1, 0), "bias": False},
    "expanded": {"sizes": (9, 20, 3), "nobody": 4, "expanded": True},
}


@pytest.mark.parametrize("case", CASES)
def test_loops_equal_ragged_products(case, monkeypatch):
    arguments = given(**CASES[case])
    found = run(*arguments)
    monkeypatch.setattr(ops, "platform", lambda: "tpu")
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(run(*arguments)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_rounds_a_product_once():
    exact, *_ = run(*given(**CASES["uneven"]))
    x, weights, share, rows = given(**CASES["uneven"])
    narrow, gradients = run(x.astype(jnp.bfloat16), weights, share, rows)
    assert narrow.dtype == gradients[0].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients[1])} == {"float32"}
    error = np.sqrt(np.mean((np.asarray(narrow, np.float32) - exact) ** 2)) / exact.std()
    assert error < 0.02  # five roundings of 2^-9


def test_weights_of_experts_that_nobody_chose_are_not_read():
    """What is not a number there does not show."""
    x, weights, share, rows = given(**CASES["few"])
    unread = jnp.asarray([not count for count in CASES["few"]["sizes"]])
    ruined = jax.tree.map(
        lambda w: jnp.where(unread.reshape(-1, *[1] * (w.ndim - 1)), jnp.nan, w), weights
    )
    wanted, found = run(x, weights, share, rows), run(x, ruined, share, rows)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("m", [1, 2, 15, 64, 100, 4096, 5001])
@pytest.mark.parametrize("e", [1, 4, 128])
def test_some_product_holds_all_rows_and_most_hold_little_more_than_theirs(m, e):
    sizes = ops._sizes(Rows(jnp.zeros(m), jnp.zeros(e), jnp.zeros((m, 1))))
    assert sizes[-1] >= m
    assert sizes == sorted(set(sizes))
    assert all(size % sizes[0] == 0 for size in sizes)
    fair = max(m // e, 8)
    for n in range(1, min(m, 2 * fair) + 1):
        waste = next(s for s in sizes if s >= n) - n
        assert waste < max(8, 3 * n if n <= 64 else 64, fair // 4)
