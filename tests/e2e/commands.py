"""The command line as processes of their own, that can be killed; and what a run left behind."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from ropewalk import cli
from ropewalk.checkpoint import manager
from ropewalk.metrics.writers import METRICS_FILE

STEPS = 24
RECIPE: dict[str, Any] = {
    "model": {
        "family": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 64,
    },
    "tokenizer": {"bpe": 272},
    "data": {"holdout": {"column": "title", "values": ["c"]}, "batch_size": 8, "length": 32},
    "optimizer": {"learning_rate": 0.01, "schedule": {"kind": "wsd", "warmup_steps": 4}},
    "steps": STEPS,
    "evaluate": {"every": 8},
    "samples": {"every": 12, "max_new_tokens": 4},
    "checkpoint": {"every": 5},
    "metrics": {"tensorboard": False},
}
# What two runs of the same recipe must agree on; the rest of a row are times.
EXACT = ("loss", "accuracy", "grad_norm", "learning_rate", "skipped", "tokens")

# The server imports everything once and starts no backend; each command is a fork of it, and so
# starts in milliseconds instead of five seconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, "ropewalk.train.loop", "ropewalk.checkpoint.compare"])


class Command:
    """`ropewalk ARGUMENTS` in a process of its own, its output in files."""

    def __init__(
        self,
        *arguments: str,
        log: Path,
        devices: int = 1,
        file_bytes: int = resource.RLIM_INFINITY,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`file_bytes`: a write that makes a file larger fails, as on a full disk."""
        cache = log.parent / "programs"
        environment = {
            **(environment or {}),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={devices}",
        }
        self.log = log
        self.process = _CONTEXT.Process(
            target=_main, args=(arguments, log, file_bytes, environment)
        )
        self.process.start()

    def wait(self, timeout_s: float = 120) -> int:
        """The exit code; minus the signal's number for a process that was killed."""
        self.process.join(timeout_s)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise TimeoutError(self.stderr)
        return code

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid or 0, number)

    def until(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Blocks until something is so. Raises where the process ended, or time did, before."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end or self.process.exitcode is not None:
                raise RuntimeError(f"exit code {self.process.exitcode}: {self.stderr}")
            time.sleep(0.001)

    @property
    def stdout(self) -> str:
        return self.log.with_suffix(".out").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self.log.with_suffix(".err").read_text(encoding="utf-8")


def _main(
    arguments: tuple[str, ...], log: Path, file_bytes: int, environment: dict[str, str]
) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= environment
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    jax.config.update("jax_compilation_cache_dir", environment["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    sys.argv[:] = ["ropewalk", *arguments]
    cli.main()


def write_recipe(directory: Path, **changes: Any) -> Path:
    """The recipe and its data: three documents, one of them held out."""
    source = np.random.default_rng(0)
    words = ["rope", "walk", "strand", "lay", "the", "yarn", "of", "tar"]
    documents = [
        {"title": name, "text": " ".join(source.choice(words, size)) + "."}
        for name, size in (("a", 1500), ("b", 900), ("c", 200))
    ]
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    values = {**RECIPE, **changes}
    values["data"] = {**values["data"], "sources": [{"path": str(data)}]}
    recipe = directory / "recipe.yml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe


def lines(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl, while it runs too."""
    path = run / METRICS_FILE
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]


def numbers(run: Path) -> dict[int, dict[str, float]]:
    """What was computed at each step. Raises ValueError when a step was recorded twice."""
    found: dict[int, dict[str, float]] = {}
    for row in lines(run):
        if "loss" in row:
            if row["step"] in found:
                raise ValueError(f"step {row['step']} is recorded twice")
            kept = {name: v for name, v in row.items() if name in EXACT or name.startswith("eval_")}
            found[row["step"]] = kept
    return found


def at_step(run: Path, step: int) -> Callable[[], bool]:
    """Whether a run has recorded a step."""
    return lambda: any("loss" in row and row["step"] >= step for row in lines(run))


def arrays(run: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Everything in a run's checkpoint: weights, optimizer state, counters."""
    return manager.read_arrays(run / "checkpoints" / str(step))


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[path].tobytes() == other[path].tobytes() for path in one
    )
