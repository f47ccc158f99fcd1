"""One self-contained page about a run: headline figures, curves, samples, recipe.

Reads only what the run wrote (recipe.yml, metrics.jsonl, samples.jsonl); needs neither model nor
device. The page opens from disk and asks nothing of a network.
"""

import array
import dataclasses
import importlib.resources
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from ropewalk.core.config import read_yaml
from ropewalk.core.errors import ConfigError
from ropewalk.core.storage import write_atomic
from ropewalk.metrics import curves
from ropewalk.metrics.writers import METRICS_FILE, SAMPLES_FILE, duration, told

REPORT_FILE = "report.html"
RECIPE_FILE = "recipe.yml"
_SERIES = (
    "loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "skipped", "tokens",
    "eval_loss", "eval_perplexity", "eval_bits_per_byte",
)  # fmt: skip
_ENDS = {"finished": "finished", "target": "reached its target"}
_SHOWN_SAMPLES, _ALL_SAMPLES, _ALL_EVENTS = 4, 40, 200


class Series:
    """Values of one name by step, in the order written; null is NaN."""

    def __init__(self) -> None:
        self.steps = array.array("d")
        self.values = array.array("d")

    def append(self, step: int, value: Any) -> None:
        """Adds a value; what is no number (null stands for NaN and infinity) is NaN."""
        self.steps.append(step)
        self.values.append(value if isinstance(value, int | float) else math.nan)

    def points(self) -> curves.Points:
        """(step, value) pairs."""
        return list(zip(self.steps, self.values, strict=True))

    def last(self) -> float | None:
        """The last finite value, None if there is none."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), None)

    def median(self) -> float | None:
        """The median of the finite values, None if there is none."""
        finite = [value for value in self.values if math.isfinite(value)]
        return statistics.median(finite) if finite else None


@dataclasses.dataclass
class History:
    """All that a run wrote of itself."""

    series: dict[str, Series]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    steps: int = 0
    wall_s: float = 0.0

    @property
    def started(self) -> dict[str, Any]:
        """The fields of the newest "started" event; empty if there was none."""
        return next((event for event in reversed(self.events) if event["event"] == "started"), {})


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into the run directory and returns its path.

    A run that has not come to its first step gets a page that says so. Raises ConfigError when the
    directory holds neither recipe.yml nor metrics.jsonl.
    """
    run_dir = Path(run_dir)
    recipe_file = run_dir / RECIPE_FILE
    if not recipe_file.exists() and not (run_dir / METRICS_FILE).exists():
        raise ConfigError(
            f"{run_dir} is not a run: it holds neither {RECIPE_FILE} nor {METRICS_FILE}; "
            "name the directory that `ropewalk train` printed"
        )
    recipe = read_yaml(recipe_file) if recipe_file.exists() else {}
    history = read_history(run_dir)
    page = _template().render(
        name=run_dir.resolve().name,
        history=history,
        total=_total_steps(history, recipe),
        status=_status(history, recipe),
        hero=_hero(history),
        tiles=_tiles(history, recipe),
        charts=charts(history),
        marks=_marks(history),
        samples=_sample_groups(history.samples),
        events=_event_rows(history.events),
        recipe=recipe_file.read_text(encoding="utf-8").splitlines() if recipe_file.exists() else [],
        versions=history.started.get("versions", {}),
    )
    write_atomic(run_dir / REPORT_FILE, page)
    return run_dir / REPORT_FILE


def read_history(run_dir: str | Path) -> History:
    """Reads a run's metrics, events and samples; lines that are no JSON object are passed over."""
    run_dir = Path(run_dir)
    history = History({name: Series() for name in _SERIES}, [], list(_rows(run_dir / SAMPLES_FILE)))
    session_start = last = None
    for row in _rows(run_dir / METRICS_FILE):
        step, now = row["step"], row.get("time")
        if "event" in row:
            history.events.append(row)
            if row["event"] == "started" and last is not None:
                history.wall_s += last - (session_start or last)
                session_start = None
        else:
            history.steps = max(history.steps, step)
            for name in _SERIES:
                if name in row:
                    history.series[name].append(step, row[name])
        if now is not None:
            session_start, last = session_start or now, now
    if last is not None:
        history.wall_s += last - (session_start or last)
    return history


def charts(history: History) -> list[curves.Chart]:
    """The report's charts, those without a finite value left out."""
    series, x_range = history.series, (0.0, float(max(history.steps, 1)))
    held_out = curves.Line("held-out", "held-out", curves.downsample(series["eval_loss"].points()))
    bits = curves.Line(
        "held-out", "held-out", curves.downsample(series["eval_bits_per_byte"].points())
    )
    rate = curves.Line("learning rate", "main", curves.downsample(series["learning_rate"].points()))
    norm = _noisy(series["grad_norm"], "each step")
    throughput = curves.Line(
        "running mean", "main", curves.downsample(series["tokens_per_s"].points())
    )
    found = (
        curves.lay_out(
            "Loss",
            "nats per token",
            [*_noisy(series["loss"], "training"), held_out],
            x_range,
            _plain,
        ),
        curves.lay_out("Held-out bits per byte", "", [bits], x_range, _plain),
        curves.lay_out("Throughput", "tokens/s", [throughput], x_range, _compact),
        curves.lay_out("Learning rate", "", [rate], x_range, _plain),
        curves.lay_out("Gradient norm", "before clipping", norm, x_range, _plain),
    )
    return [chart for chart in found if chart is not None]


def _noisy(series: Series, name: str) -> list[curves.Line]:
    """A faint line of every value under a smoothed one; a short series as it is."""
    points = series.points()
    span = len(points) // 60
    if span < 3:
        return [curves.Line(name, "main", curves.downsample(points))]
    smoothed = curves.downsample(curves.smooth(points, span))
    return [
        curves.Line(name, "faint", curves.downsample(points)),
        curves.Line("smoothed", "main", smoothed),
    ]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # the run may be writing this line right now
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def _template() -> jinja2.Template:
    text = (
        importlib.resources.files(__package__)
        .joinpath("report.html.j2")
        .read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = lambda value: f"{value:,.0f}"
    return environment.from_string(text)


def _total_steps(history: History, recipe: dict[str, Any]) -> int:
    total = history.started.get("total_steps", recipe.get("steps"))
    return total if isinstance(total, int) else history.steps


def _status(history: History, recipe: dict[str, Any]) -> str:
    total = _total_steps(history, recipe)
    if not history.steps:
        return "no step has been recorded yet"
    ended = next((row for row in reversed(history.events) if row["event"] in _ENDS), None)
    if ended is not None and ended["step"] >= history.steps:
        return f"{_ENDS[ended['event']]} after {history.steps:,} steps"
    if history.steps >= total:
        return f"finished after {history.steps:,} steps"
    return f"{history.steps:,} of {total:,} steps so far"


def _hero(history: History) -> dict[str, str] | None:
    """The one figure that says how good the model became."""
    for name, unit, label, digits in (
        ("eval_bits_per_byte", "bits per byte", "held-out text, lower is better", 3),
        ("eval_loss", "nats per token", "held-out loss, lower is better", 3),
        ("loss", "nats per token", "training loss, last step", 3),
    ):
        series = history.series[name]
        value = series.last()
        if value is not None:
            first = next(first for first in series.values if math.isfinite(first))
            change = (
                f"from {first:.{digits}f} at step {series.steps[0]:,.0f}" if first != value else ""
            )
            return {"value": f"{value:.{digits}f}", "unit": unit, "label": label, "change": change}
    return None


def _tiles(history: History, recipe: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, detail) of the headline figures that are known."""
    series, started = history.series, history.started
    total = _total_steps(history, recipe)
    eval_loss, perplexity = series["eval_loss"].last(), series["eval_perplexity"].last()
    tokens, rate, mfu = (
        series["tokens"].last(),
        series["tokens_per_s"].median(),
        series["mfu"].median(),
    )
    skipped = series["skipped"].last() or 0
    tiles = []
    if eval_loss is not None:
        tiles.append(
            (
                "Held-out loss",
                f"{eval_loss:.3f}",
                f"perplexity {perplexity:.2f}" if perplexity else "",
            )
        )
    if (loss := series["loss"].last()) is not None:
        tiles.append(("Training loss", f"{loss:.3f}", "last step"))
    detail = f"of {total:,}" if total > history.steps else ""
    if skipped:
        detail = f"{detail}, {skipped:.0f} skipped".lstrip(", ")
    tiles.append(("Steps", f"{history.steps:,}", detail))
    if tokens is not None:
        tiles.append(("Tokens", _compact(tokens), f"{tokens:,.0f}" if tokens >= 1000 else ""))
    if history.wall_s:
        sessions = sum(row["event"] == "started" for row in history.events)
        tiles.append(
            (
                "Wall time",
                duration(history.wall_s),
                f"in {sessions} sessions" if sessions > 1 else "",
            )
        )
    if rate is not None:
        tiles.append(("Tokens per second", f"{rate:,.0f}", "median"))
    if mfu is not None:
        label = started.get("mfu_label", "MFU")
        tiles.append(
            (label[0].upper() + label[1:], f"{mfu:.1%}", started.get("mfu_basis", "median"))
        )
    if "device" in started:
        tiles.append(("Device", *_device(started)))
    return tiles


def _device(started: dict[str, Any]) -> tuple[str, str]:
    count, processes = started.get("devices", 1), started.get("processes", 1)
    name, detail = started["device"], []
    if started.get("platform") == "cpu":
        detail = [f"{count} simulated devices"] if count > 1 else []
    elif count > 1:
        name = f"{count} x {name}"
    if processes > 1:
        detail.append(f"{processes} processes")
    return name, ", ".join(detail)


def _marks(history: History) -> list[dict[str, Any]]:
    """Skipped steps and resumptions, as percent from the left; marks closer than the eye can part
    are one.
    """
    marks: dict[tuple[str, float], dict[str, Any]] = {}
    for kind, step in [*_skipped_steps(history), *_resumed_steps(history)]:
        at = round(100 * step / max(history.steps, 1), 1)
        mark = marks.setdefault((kind, at), {"kind": kind, "at": at, "step": step, "count": 0})
        mark["count"] += 1
    return list(marks.values())


def _skipped_steps(history: History) -> Iterator[tuple[str, int]]:
    steps = {row["step"] for row in history.events if row["event"] == "skipped"}
    before = 0.0
    for step, count in history.series["skipped"].points():
        if count > before:
            steps.add(int(step))
        before = count if math.isfinite(count) else before
    return (("skipped", step) for step in sorted(steps))


def _resumed_steps(history: History) -> Iterator[tuple[str, int]]:
    starts = [row["step"] for row in history.events if row["event"] == "started"]
    return (("resumed", step) for step in starts[1:])


def _sample_groups(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples by prompt in order of time: a few evenly spread ones to show, the others to
    unfold.
    """
    prompts: dict[str, dict[int, dict[str, Any]]] = {}
    for row in samples:  # a resumed run may sample its step again
        prompts.setdefault(str(row.get("prompt", "")), {})[row["step"]] = row
    groups = []
    for prompt, by_step in prompts.items():
        rows = _spread(list(by_step.values()), _ALL_SAMPLES)
        shown = _spread(rows, _SHOWN_SAMPLES)
        steps = {row["step"] for row in shown}
        groups.append(
            {
                "prompt": prompt,
                "shown": shown,
                "more": [row for row in rows if row["step"] not in steps],
            }
        )
    return groups


def _spread(rows: list[Any], limit: int) -> list[Any]:
    if len(rows) <= limit:
        return rows
    return [rows[round(index * (len(rows) - 1) / (limit - 1))] for index in range(limit)]


def _event_rows(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest events in words; what a "started" event tells stands elsewhere on the page."""
    first_start = next((row for row in events if row["event"] == "started"), None)
    rows = []
    for row in events[-_ALL_EVENTS:]:
        fields = {key: value for key, value in row.items() if key not in ("step", "event", "time")}
        name = row["event"]
        words = ", ".join(f"{key} {told(value)}" for key, value in fields.items())
        if name == "started":
            name, words = ("started" if row is first_start else "resumed"), ""
        rows.append({"step": row["step"], "event": name, "told": words})
    return rows


def _plain(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        if not exponent:
            mantissa, _, exponent = f"{value:.1e}".partition("e")
        return (
            f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
        )
    return f"{value:.6g}"


def _compact(value: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"
