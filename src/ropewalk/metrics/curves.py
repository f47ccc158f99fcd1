"""Curves for the report: series read from a run's lines, thinned, scaled and laid out as SVG paths.

Knows no page and no style; everything is in percent of a box, so that the page may stretch it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Line:
    """One named series of a chart; `role` is the style it is drawn in ("faint", "main",
    "held-out").
    """

    name: str
    role: str
    points: Points


@dataclasses.dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, `at` in percent from the left or the top."""

    at: float
    label: str


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A line laid out: SVG path data in a 1000 x 1000 box, joined up and as one dot a point."""

    line: Line
    data: str
    dots: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart laid out: axes, ticks and lines."""

    title: str
    unit: str
    scale: str
    paths: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def values(self) -> dict[str, Any]:
        """What hovering needs, as JSON types: ranges, and each line's name and points."""
        return {
            "unit": self.unit,
            "scale": self.scale,
            "x": self.x_range,
            "y": self.y_range,
            "lines": [
                {
                    "name": path.line.name,
                    "role": path.line.role,
                    "points": _rounded(path.line.points),
                }
                for path in self.paths
            ],
        }


def lay_out(
    title: str,
    unit: str,
    lines: Sequence[Line],
    x_range: tuple[float, float],
    label: Callable[[float], str],
) -> Chart | None:
    """A chart of the lines that have finite points; None when none has. Spread over 50-fold, y is
    logarithmic.
    """
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return None
    values = sorted(y for line in lines for _, y in line.points if math.isfinite(y))
    low, high = values[0], values[-1]
    scale = (
        "log" if low > 0 and high > 50 * low and values[len(values) // 2] < high / 8 else "linear"
    )
    low, high = _padded(low, high, scale)
    ticks = log_ticks(low, high) if scale == "log" else linear_ticks(low, high)
    place = _placer(low, high, scale)
    return Chart(
        title=title,
        unit=unit,
        scale=scale,
        paths=[
            Drawn(
                line,
                path_data(line.points, x_range, place),
                path_data(line.points, x_range, place, dots=True),
            )
            for line in lines
        ],
        x_ticks=[Tick(_percent(x, x_range), f"{x:,.0f}") for x in step_ticks(*x_range)],
        y_ticks=[Tick(100 * place(y), label(y)) for y in ticks],
        x_range=x_range,
        y_range=(low, high),
    )


def downsample(points: Points, limit: int = 1000) -> Points:
    """At most `limit` points with the least and greatest value of every bucket kept, first and last
    point too.

    Not-finite values survive as gaps: one for each bucket that holds nothing else.
    """
    if len(points) <= limit:
        return points
    inner, buckets = points[1:-1], (limit - 2) // 2
    kept = [points[0]]
    for index in range(buckets):
        start, stop = index * len(inner) // buckets, (index + 1) * len(inner) // buckets
        bucket = inner[start:stop]
        finite = [point for point in bucket if math.isfinite(point[1])]
        if not finite:
            kept.append(bucket[0])
            continue
        ends = (min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1]))
        kept.extend(sorted(set(ends)))
    return [*kept, points[-1]]


def smooth(points: Points, span: int) -> Points:
    """Exponential moving average over about `span` points, of both directions so that it does not
    lag.

    Not-finite values are passed over; each end of the line is corrected for the values it lacks.
    """
    finite = [point for point in points if math.isfinite(point[1])]
    values = [y for _, y in finite]
    forward, backward = _average(values, span), _average(values[::-1], span)[::-1]
    return [(x, (a + b) / 2) for (x, _), a, b in zip(finite, forward, backward, strict=True)]


def path_data(
    points: Points,
    x_range: tuple[float, float],
    place: Callable[[float], float],
    dots: bool = False,
) -> str:
    """SVG path data in a 1000 x 1000 box; a not-finite value lifts the pen, a lone point becomes a
    dot.
    """
    parts, pen_down = [], False
    for x, y in points:
        if not math.isfinite(y):
            pen_down = False
            continue
        spot = f"{10 * _percent(x, x_range):.1f} {1000 * place(y):.1f}"
        parts.append(f"L{spot}" if pen_down else f"M{spot}h0")
        pen_down = not dots
    return "".join(parts)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values inside [low, high], about `count` of them."""
    step = _round_step((high - low) / count)
    return [
        index * step
        for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high]; over fewer than three decades also their double and
    fivefold.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max((last - first) // 5, 1)
    factors = (1, 2, 5) if last - first < 3 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def step_ticks(low: float, high: float) -> list[float]:
    """Round whole steps inside [low, high]."""
    step = max(_round_step((high - low) / 5 or 1), 1)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [factor * power for factor in (1, 2, 2.5, 5, 10)]
    return min(steps, key=lambda step: abs(math.log(step / rough)))


def _padded(low: float, high: float, scale: str) -> tuple[float, float]:
    """A little room above and below, but not below zero for what is never negative."""
    if scale == "log":
        return low / 1.2, high * 1.2
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _average(values: list[float], span: int) -> list[float]:
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight)
    return averages


def _placer(low: float, high: float, scale: str) -> Callable[[float], float]:
    if scale == "log":
        bottom, top = math.log10(low), math.log10(high)
        return lambda y: (top - math.log10(y)) / (top - bottom)
    return lambda y: (high - y) / (high - low)


def _percent(x: float, x_range: tuple[float, float]) -> float:
    return 100 * (x - x_range[0]) / (x_range[1] - x_range[0])


def _rounded(points: Points) -> list[list[float | None]]:
    return [[x, float(f"{y:.5g}") if math.isfinite(y) else None] for x, y in points]
