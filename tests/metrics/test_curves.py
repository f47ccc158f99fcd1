import math
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.metrics import curves


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=400))
def test_thinning_keeps_extremes_ends_and_order(values):
    points = [(float(step), value) for step, value in enumerate(values)]
    thin = curves.downsample(points, limit=50)
    assert len(thin) <= 50
    assert set(map(id, thin)) <= set(map(id, points))
    assert [x for x, _ in thin] == sorted({x for x, _ in thin})
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    finite = [y for _, y in points if math.isfinite(y)]
    kept = [y for _, y in thin if math.isfinite(y)]
    if finite:
        assert (min(kept), max(kept)) == (min(finite), max(finite))


def test_a_spike_of_one_step_in_a_million_survives():
    points = [(float(step), 1.0) for step in range(1_000_000)]
    points[777_777] = (777_777.0, 50.0)
    thin = curves.downsample(points)
    assert len(thin) <= 1000
    assert (777_777.0, 50.0) in thin


def test_smoothing_leaves_a_constant_and_does_not_lag():
    constant = [(float(step), 2.0) for step in range(100)]
    assert [y for _, y in curves.smooth(constant, 20)] == pytest.approx([2.0] * 100)
    line = [(float(step), float(step)) for step in range(1000)]
    middle = curves.smooth(line, 20)[400:600]
    assert [y for _, y in middle] == pytest.approx([x for x, _ in middle], abs=1e-6)


def test_smoothing_quiets_noise():
    chance = random.Random(0)
    noise = [(float(step), chance.gauss(0, 1)) for step in range(2000)]
    power = sum(y * y for _, y in curves.smooth(noise, 40)) / 2000
    assert power < 0.1


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_linear_ticks_lie_inside_and_are_few(low, width):
    high = low + width
    ticks = curves.linear_ticks(low, high)
    assert len(ticks) <= 8
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    if width > 1e-6 * abs(low):
        assert len(ticks) >= 2


def test_paths_lift_the_pen_over_what_is_not_finite():
    points = [(0.0, 0.0), (1.0, 1.0), (2.0, math.nan), (3.0, 0.5), (4.0, 1.0)]
    data = curves.path_data(points, (0.0, 4.0), lambda y: 1 - y)
    assert data == "M0.0 1000.0h0L250.0 0.0M750.0 500.0h0L1000.0 0.0"
    dots = curves.path_data(points, (0.0, 4.0), lambda y: 1 - y, dots=True)
    assert dots.count("M") == 4
    assert "L" not in dots


def test_a_wide_spread_is_drawn_logarithmically_and_stays_in_the_box():
    spiky = [(float(step), 0.5 + (400.0 if step == 30 else 0.0)) for step in range(1, 61)]
    chart = curves.lay_out("norm", "", [curves.Line("norm", "main", spiky)], (0.0, 60.0), str)
    assert chart is not None
    assert chart.scale == "log"
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", chart.paths[0].data)]
    assert len(heights) == 60
    assert 0 <= min(heights) < 100 and 900 < max(heights) <= 1000


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 7e20])
def test_a_single_value_gets_axes_too(value):
    chart = curves.lay_out("x", "", [curves.Line("x", "main", [(1.0, value)])], (0.0, 1.0), str)
    assert chart is not None
    assert chart.y_range[0] <= value <= chart.y_range[1]
    assert len(chart.y_ticks) >= 2


def test_nothing_finite_is_no_chart():
    assert (
        curves.lay_out("x", "", [curves.Line("x", "main", [(1.0, math.nan)])], (0, 1), str) is None
    )
