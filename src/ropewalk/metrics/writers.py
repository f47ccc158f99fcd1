"""Where the numbers of a run go: JSON lines, TensorBoard, wandb, a live line. Process 0 only.

Every writer has the same four methods and takes host floats; none of them decides what is measured
or when.
"""

import importlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import secrets
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, override

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from ropewalk.core import config
from ropewalk.core.errors import ConfigError
from ropewalk.core.log import log
from ropewalk.core.storage import write_atomic
from ropewalk.metrics.meter import Peak

_EVENT: Any = event_pb2  # its classes are made when it is imported; nothing declares them
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
_PACKAGES = ("ropewalk", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Config(config.Config):
    """Which writers a run has besides metrics.jsonl and samples.jsonl, which it always writes."""

    tensorboard: bool = True
    wandb: str | None = None
    """A wandb project, or `entity/project`; none by default."""
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """`auto` is `live` on a terminal and `plain` (a line every 10 s) elsewhere."""


class Writer:
    """The interface, and a writer that writes nothing."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers of one step by name; steps never go back.

        `tokens` and `skipped` count from the start of the run.
        """

    def event(self, step: int, name: str, **fields: Any) -> None:
        """Something that happened at a step: "started" (with `facts`), "skipped", "finished" ..."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A text the model wrote at a step as the continuation of a prompt."""

    def close(self) -> None:
        """Flushes and lets go of files; may be called twice."""


class Writers(Writer):
    """Several writers as one."""

    def __init__(self, writers: Iterable[Writer]) -> None:
        self.writers = tuple(writers)

    @override
    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for writer in self.writers:
            writer.write(step, metrics)

    @override
    def event(self, step: int, name: str, **fields: Any) -> None:
        for writer in self.writers:
            writer.event(step, name, **fields)

    @override
    def sample(self, step: int, prompt: str, text: str) -> None:
        for writer in self.writers:
            writer.sample(step, prompt, text)

    @override
    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def open_writers(
    settings: Config,
    run_dir: str | Path,
    total_steps: int,
    resumed: int | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Writers:
    """The writers of a run; on every process but the first an empty set.

    `resumed` is the step of the checkpoint that the run goes on from (None: a fresh run): what was
    written of later steps is dropped, so that each step is recorded once. Raises ConfigError when
    wandb is asked for and missing.
    """
    if jax.process_index() != 0:
        return Writers([])
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    writers: list[Writer] = []
    if settings.wandb is not None:  # first: the only one that can be refused
        writers.append(Wandb(settings.wandb, run_dir, recipe or {}))
    writers.append(JsonLines(run_dir, resumed))
    if settings.tensorboard:
        writers.append(TensorBoard(run_dir / "tensorboard", resumed))
    if settings.progress != "none":
        writers.append(Progress(total_steps, settings.progress))
    return Writers(writers)


def facts(total_steps: int, peak: Peak | None = None) -> dict[str, Any]:
    """Fields of the "started" event that every start of a run writes: what places its numbers.

    Steps to do, device, counts, versions, and what `mfu` is held against.
    """
    device = jax.devices()[0]
    known = {
        "total_steps": total_steps,
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version()} | _versions(),
    }
    if peak is not None:
        known |= {"mfu_label": peak.label, "mfu_basis": peak.basis, "peak_flops": peak.flops}
    return known


class JsonLines(Writer):
    """`metrics.jsonl` (numbers, events) and `samples.jsonl`: one JSON object a line, flushed.

    A number that is not finite is written as null, so that any JSON parser reads the file. Each
    line carries `time`, seconds since 1970.
    """

    def __init__(self, run_dir: str | Path, resumed: int | None = None) -> None:
        self._metrics = _open_lines(Path(run_dir) / METRICS_FILE, resumed)
        self._samples = _open_lines(Path(run_dir) / SAMPLES_FILE, resumed)

    @override
    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._metrics.write(_line({"step": step, **metrics, "time": _now()}))

    @override
    def event(self, step: int, name: str, **fields: Any) -> None:
        self._metrics.write(_line({"step": step, "event": name, **fields, "time": _now()}))

    @override
    def sample(self, step: int, prompt: str, text: str) -> None:
        self._samples.write(_line({"step": step, "prompt": prompt, "text": text, "time": _now()}))

    @override
    def close(self) -> None:
        self._metrics.close()
        self._samples.close()


class TensorBoard(Writer):
    """Event files with scalars as `train/NAME` and `eval/NAME`, samples and events as text.

    Written at once by the caller's thread: what cannot be written is an error here and not, as with
    the library's background writer, a queue that nobody empties.
    """

    def __init__(self, directory: str | Path, resumed: int | None = None) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        suffix = f".{time.time_ns()}"  # else two starts within a second share one file
        self._events: EventsWriter | None = EventsWriter(str(Path(directory) / "events"), suffix)
        first = 0 if resumed is None else resumed + 1
        self._add(
            first, session_log=_EVENT.SessionLog(status=_EVENT.SessionLog.START)
        )  # hides what follows it

    @override
    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, str) or value is None:
                continue
            group, short = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
            self._add(step, summary=summary.scalar(f"{group}/{short}", float(value)))

    @override
    def event(self, step: int, name: str, **fields: Any) -> None:
        self._text(f"events/{name}", json.dumps(_plain(fields), indent=1), step)

    @override
    def sample(self, step: int, prompt: str, text: str) -> None:
        self._text("samples", f"{prompt}{text}", step)

    @override
    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def _text(self, tag: str, text: str, step: int) -> None:
        block = "\n".join(f"    {line}" for line in text.splitlines())  # markdown shows it as it is
        self._add(step, summary=summary.text(tag, block))

    def _add(self, step: int, **content: Any) -> None:
        if self._events is not None:
            self._events.write_event(_EVENT.Event(wall_time=time.time(), step=step, **content))
            self._events.flush()


class Wandb(Writer):
    """Sends everything to Weights & Biases; `wandb_id` keeps the id, so that a resumed run goes on.

    wandb keeps the first value it was given for a step, so steps repeated after a kill show their
    first recording.
    """

    def __init__(self, project: str, run_dir: str | Path, recipe: Mapping[str, Any]) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")  # optional dependency
        except ImportError:
            raise ConfigError(
                f"metrics.wandb = {project!r}: the package wandb is not installed; "
                "`pip install 'ropewalk[wandb]'` installs it, or leave the key out "
                "(metrics.jsonl and TensorBoard files are written without it)"
            ) from None
        entity, _, name = project.rpartition("/")
        kept = Path(run_dir) / "wandb_id"
        if not kept.exists():
            write_atomic(kept, secrets.token_hex(4))
        self._wandb = wandb
        self._run = wandb.init(
            project=name,
            entity=entity or None,
            dir=str(run_dir),
            name=Path(run_dir).name,
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=dict(recipe),
        )

    @override
    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    @override
    def event(self, step: int, name: str, **fields: Any) -> None:
        self._run.summary[f"event/{name}"] = {"step": step, **_plain(fields)}

    @override
    def sample(self, step: int, prompt: str, text: str) -> None:
        table = self._wandb.Table(columns=["step", "prompt", "text"], data=[[step, prompt, text]])
        self._run.log({"samples": table}, step=step)

    @override
    def close(self) -> None:
        self._run.finish()


class Progress(Writer):
    """One live line on a terminal's stderr; elsewhere a plain line at most every `every_s` seconds.

    Evaluations, events and samples are printed above the line, and stay.
    """

    def __init__(
        self,
        total_steps: int,
        style: Literal["auto", "live", "plain"] = "auto",
        every_s: float = 10.0,
        label: str = "MFU",
        console: Console | None = None,
    ) -> None:
        """`label` names what `mfu` is held against until a "started" event names it."""
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        live = self._console.is_terminal if style == "auto" else style == "live"
        self._total, self._every_s, self._label = total_steps, every_s, label
        self._shown = -math.inf
        self._live: Live | None = None
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []
        if live:
            plain_stderr = sys.stderr
            self._live = Live(console=self._console, refresh_per_second=4, redirect_stdout=False)
            self._live.start()
            self._redirect_log(plain_stderr)

    @override
    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        if "eval_loss" in metrics:
            self._print(_eval_line(step, metrics), "bold")
        if "loss" not in metrics:
            return
        line = self._line(step, metrics)
        now = time.monotonic()
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif step >= self._total or now - self._shown >= self._every_s:
            self._print(line)
            self._shown = now

    @override
    def event(self, step: int, name: str, **fields: Any) -> None:
        if name == "started":
            self._label = fields.get("mfu_label", self._label)
            return
        words = ", ".join(f"{key} {told(value)}" for key, value in fields.items())
        self._print(f"step {step:,}  {name}" + (f": {words}" if words else ""), "yellow")

    @override
    def sample(self, step: int, prompt: str, text: str) -> None:
        self._print(f"step {step:,}  the model writes:", "dim")
        shown = Text("  ").append(prompt.replace("\n", "\n  "), "bold")
        self._console.print(shown.append(text.replace("\n", "\n  ")))

    @override
    def close(self) -> None:
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str, style: str = "") -> None:
        self._console.print(Text(line, style))

    def _line(self, step: int, metrics: Mapping[str, Any]) -> str:
        parts = [f"step {step:,}/{self._total:,}", f"loss {metrics['loss']:.4f}"]
        if _known(metrics, "tokens_per_s"):
            parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
        if _known(metrics, "mfu"):
            parts.append(f"{self._label} {metrics['mfu']:.1%}")
        if _known(metrics, "eta_s"):
            parts.append(f"{duration(metrics['eta_s'])} left")
        if metrics.get("skipped"):
            parts.append(f"{metrics['skipped']:.0f} skipped")
        return "  ".join(parts)

    def _redirect_log(self, plain_stderr: Any) -> None:
        """Sends the log above the live line; it was bound to stderr before `Live` took it over."""
        for handler in log.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is plain_stderr:
                self._streams.append((handler, plain_stderr))
                handler.setStream(sys.stderr)


def duration(seconds: float) -> str:
    """Seconds as a person says them: `48 s`, `3 min 20 s`, `5 h 04 min`, `2 d 03 h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def told(value: Any) -> str:
    """A field of an event for a person: a number in five digits, a list's first five entries."""
    if isinstance(value, list | tuple):
        more = f" and {len(value) - 5} more" if len(value) > 5 else ""
        return ", ".join(map(told, value[:5])) + more
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _open_lines(path: Path, resumed: int | None) -> Any:
    if path.exists():
        _keep_until(path, -1 if resumed is None else resumed)
    return path.open("a", encoding="utf-8", buffering=1)


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, and what is no JSON (a torn end)."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept, torn = [], 0
    for line in lines:
        row = _parsed(line)
        if row is None or not line.endswith(b"\n"):
            torn += 1
        elif row["step"] <= step:
            kept.append(line)
    if torn:
        log.warning(
            "%s: dropped %d unreadable line(s) that an earlier stop left behind", path, torn
        )
    if len(kept) < len(lines):
        write_atomic(path, b"".join(kept))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value in JSON's own types; a number that is not finite becomes None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        return _plain(value.item() if getattr(value, "ndim", 0) == 0 else value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _now() -> float:
    return round(time.time(), 3)


def _known(metrics: Mapping[str, Any], name: str) -> bool:
    value = metrics.get(name)
    return value is not None and math.isfinite(value)


def _eval_line(step: int, metrics: Mapping[str, Any]) -> str:
    parts = [f"step {step:,}  held-out loss {metrics['eval_loss']:.4f}"]
    if _known(metrics, "eval_perplexity"):
        parts.append(f"perplexity {metrics['eval_perplexity']:.2f}")
    if _known(metrics, "eval_bits_per_byte"):
        parts.append(f"{metrics['eval_bits_per_byte']:.3f} bits per byte")
    return "  ".join(parts)


def _cpu_name() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")  # Linux; elsewhere `platform` knows the name itself
    if listing.exists():
        lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {cores} cores"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
