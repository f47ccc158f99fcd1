"""The kernels for CPUs against numpy and XLA: as they are built for this machine, and for one with
nothing but what every machine has."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ropewalk.layers.cache import Paged, View
from ropewalk.ops.kernels import cpu

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="JAX's device here is no CPU"
)
PLAIN = "-std=c++17", "-O2", "-shared", "-fPIC", "-w"


@pytest.fixture(params=["native", "plain"])
def kernels(request, monkeypatch):
    """The kernels of this machine, and those that any of its kind can run."""
    assert cpu.built() is None
    if request.param == "plain":
        cpu.register("plain", cpu.library(shutil.which("c++") or "g++", PLAIN))
        monkeypatch.setattr(cpu, "_NAME", "plain")


def normal(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


@pytest.mark.parametrize(
    ("rows", "inner", "outer"),
    [(1, 576, 49), (2, 70, 33), (3, 5, 7), (4, 64, 16), (7, 96, 1), (23, 33, 130), (64, 128, 20)],
)
def test_products_are_sums_in_float32_rounded_once(kernels, rows, inner, outer):
    rng = np.random.default_rng(rows)
    x, weight = (normal(rng, shape, jnp.bfloat16) for shape in ((rows, inner), (outer, inner)))
    found = np.asarray(jax.jit(lambda *each: cpu.rows(*each))(x, weight), np.float64)
    wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    # Half of bfloat16's last place, and what float32 sums of numbers as large as these lose.
    lost = 1e-6 * (np.abs(np.asarray(x, float)) @ np.abs(np.asarray(weight, float)).T)
    assert np.all(np.abs(found - wanted) <= np.abs(wanted) * 2.0**-8 + lost)


def test_a_row_does_not_depend_on_its_neighbours(kernels):
    rng = np.random.default_rng(1)
    x, weight = normal(rng, (13, 200), jnp.bfloat16), normal(rng, (50, 200), jnp.bfloat16)
    product = jax.jit(lambda *each: cpu.rows(*each))
    together = product(x, weight)
    for count in (1, 2, 3, 5, 12):
        np.testing.assert_array_equal(product(x[:count], weight), together[:count])


def test_what_is_not_a_number_stays_in_its_row(kernels):
    x, weight = jnp.ones((3, 40), jnp.bfloat16), jnp.ones((5, 40), jnp.bfloat16)
    x = x.at[1, 39].set(jnp.nan).at[2, 0].set(jnp.inf)
    found = np.asarray(jax.jit(lambda *each: cpu.rows(*each))(x, weight), np.float32)
    assert np.all(found[0] == 40) and np.all(np.isnan(found[1])) and np.all(found[2] == np.inf)


def test_gradients_of_products_are_those_of_xla(kernels):
    rng = np.random.default_rng(2)
    x, weight = normal(rng, (3, 32), jnp.bfloat16), normal(rng, (7, 32), jnp.bfloat16)
    each = normal(rng, (3, 7), jnp.bfloat16)

    def grads(product):
        def loss(x, w):
            return jnp.sum((product(x, w) * each).astype(jnp.float32))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weight)

    for found, wanted in zip(grads(cpu.rows), grads(lambda x, w: x @ w.T), strict=True):
        found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(found, wanted, rtol=0.01, atol=0.01)


# What attention has beside plain one; pages whose places and features fill registers, and such
# that do not; one query a sequence, and several.
NARROW, WIDE = jnp.bfloat16, jnp.float32
CASES = [
    (NARROW, "same", 16, 64, 1, {}),
    (WIDE, "same", 4, 20, 3, {}),
    (NARROW, "int8", 16, 64, 3, {"sinks": True}),
    (WIDE, "int8", 4, 20, 1, {"soft_cap": 2.0}),
    (WIDE, "same", 16, 64, 3, {"near": (9, None), "sinks": True}),
    (NARROW, "same", 4, 20, 3, {"near": (None, 16), "soft_cap": 2.0}),
    (WIDE, "int8", 24, 96, 1, {"near": (None, 16)}),
    (NARROW, "same", 24, 96, 1, {"near": (9, None), "outer": 24}),
    # Some see nothing in the first pages that are looked at together.
    (WIDE, "same", 4, 20, 3, {"near": (9, None)}),
    # A page that a sequence gave back.
    (WIDE, "same", 16, 64, 1, {"hole": True}),
]


@pytest.mark.parametrize(("dtype", "stored", "size", "inner", "t", "more"), CASES)
def test_attention_over_pages_is_that_of_xla(
    kernels, monkeypatch, dtype, stored, size, inner, t, more
):
    """Of several sequences, one of them nobody's."""
    found, wanted = (
        attended(monkeypatch, kernel, dtype, stored, size, inner, t, **more)
        for kernel in (True, False)
    )
    assert found.dtype == wanted.dtype == dtype and found.shape == wanted.shape
    # XLA's widens bfloat16 queries, and keeps int8 keys as wide as they.
    near = 2e-5 if dtype == jnp.float32 else 0.02
    found, wanted = (np.asarray(y[:3], np.float32) for y in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=near, atol=near)


def attended(
    monkeypatch, kernel, dtype, stored, size, inner, t,
    near=(None, None), soft_cap=None, sinks=False, outer=None, hole=False,
):  # fmt: skip
    """What queries [4, t, 6, inner] of four sequences find on pages of `size`."""
    rng, most = np.random.default_rng(3), 144 // size
    kind = jnp.int8 if stored == "int8" else dtype
    shapes = [(2, inner), (2, outer or inner)]
    cache = Paged.empty(4 * most, size, shapes, kind)
    pages = jnp.asarray(rng.permutation(4 * most).reshape(4, most), jnp.int32)
    buffers = [normal(rng, pool.shape, jnp.float32) for pool in cache.buffers]
    if stored == "int8":
        buffers = [jnp.rint(30 * pool) for pool in buffers]
    scales = [jnp.asarray(rng.uniform(0.01, 0.05, x.shape), jnp.float32) for x in cache.scales]
    buffers = [x.astype(kind) for x in buffers]
    cache = dataclasses.replace(cache, buffers=tuple(buffers), scales=tuple(scales))
    lengths = jnp.asarray([5, 37, 80, 1])
    positions = (lengths[:, None] - 1 + jnp.arange(t)).astype(jnp.int32)
    place = jnp.take_along_axis(pages, positions // size, axis=1) * size + positions % size
    at = jnp.broadcast_to(jnp.arange(most * size, dtype=jnp.int32), (4, most * size))
    at = at.at[3].set(-1)
    if hole and kernel:
        pages = pages.at[1, 0].set(-1)
    elif hole:
        at = at.at[1, :size].set(-1)
    count = jnp.int32(-(-int(positions.max() + 1) // size))
    view = View(pages, at, jnp.ones_like(at), place, count)
    cache = dataclasses.replace(cache, view=view)
    q = normal(rng, (4, t, 6, inner), dtype)
    new = [normal(rng, (4, t, *shape), dtype) for shape in shapes]
    more = {"sinks": normal(rng, 6, jnp.float32)} if sinks else {}
    monkeypatch.setattr(cpu, "ready", lambda: kernel)
    segments = jnp.ones_like(positions)
    how = {"scale": inner**-0.5, "soft_cap": soft_cap, **more}
    return jax.jit(
        lambda cache, q, new: cache.attend(q, new, positions, segments, near, None, **how)[0]
    )(cache, q, new)


def test_a_query_that_sees_nothing_gets_zeros(kernels):
    """Beside one that sees, and alone; in pages of which others may hold anything."""
    pool = jnp.full((2, 1, 16, 32), 3.0)
    pools = pool, pool
    seen = jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16), jnp.int32)
    queries = jnp.full((2, 2), 5, jnp.int32), jnp.asarray([[1, 0], [0, 0]], jnp.int32)
    sinks, none = jnp.full((1, 2), -1e30), (None, None)
    look = jax.jit(
        lambda q: cpu.attend(q, pools, (), seen, queries, jnp.int32(1), sinks, none, 1.0, None)
    )
    y = np.asarray(look(jnp.ones((2, 1, 2, 32))))
    np.testing.assert_allclose(y[0, 0, 0], 3.0)
    assert not np.any(y[0, 0, 1]) and not np.any(y[1])


def test_without_a_compiler_there_is_a_reason(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    reason = cpu._built.__wrapped__()
    assert reason is not None and "no C++ compiler" in reason and reason in caplog.text


def test_a_source_that_no_compiler_takes_is_told_and_leaves_nothing(monkeypatch, tmp_path):
    broken = tmp_path / "cpu.cc"
    broken.write_text("int main( {")
    monkeypatch.setattr(cpu, "_SOURCE", broken)
    monkeypatch.setattr(cpu, "kernels_directory", lambda: tmp_path / "kernels")
    reason = cpu._built.__wrapped__()
    assert reason is not None and "refuses their source" in reason
    assert not list((tmp_path / "kernels").iterdir())
