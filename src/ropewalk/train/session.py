"""What surrounds the steps of a run: where it starts from, signals, and the directory it may
use."""

import contextlib
import glob
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.experimental import multihost_utils

from ropewalk.checkpoint import pretrained
from ropewalk.checkpoint.integrity import read_manifest
from ropewalk.checkpoint.manager import Manager
from ropewalk.core.config import flatten
from ropewalk.core.errors import CheckpointError, ConfigError
from ropewalk.core.log import log
from ropewalk.core.storage import LOCK, write_atomic
from ropewalk.train import state as states
from ropewalk.train.build import RECIPE, Built, keeps_tokenizer
from ropewalk.train.state import State

EXPORT = "hf"
# A checkpoint made with other values of these is not this run's: its weights, data or optimizer
# mean something else.
_FIXED = ("model", "tokenizer", "data", "optimizer.kind", "precision", "seed")
_FREE = ("data.epochs",)


def first_state(built: Built, manager: Manager) -> tuple[State, int | None, dict[str, float]]:
    """The state to go on from, the step it was restored from (or None), and that checkpoint's
    metrics.

    Raises CheckpointError when the checkpoint is of another model, or made with values that may not
    change.
    """
    restored = manager.restore(built.described.tree())
    if restored is None:
        return _begin(built), None, {}
    built.batches.set_state(restored.data_state)
    return built.described.filled(restored.state), restored.step, restored.metrics


def keep_recipe(built: Built) -> None:
    """Writes the tokenizer and then the recipe that names it into the run directory."""
    if jax.process_index() != 0:
        return
    if built.tokenizer is not None and not keeps_tokenizer(built.run):
        home = built.directory / pretrained.TOKENIZER
        shutil.rmtree(home, ignore_errors=True)  # of a start with another recipe, never trained
        built.tokenizer.save(home)
    write_atomic(built.directory / RECIPE, yaml.safe_dump(built.recipe, sort_keys=False))


def check_directory(directory: Path) -> None:
    """Raises ConfigError unless a run may live there: it is absent, empty, or a run's."""
    if glob.has_magic(str(directory.absolute())):
        raise ConfigError(
            f"directory: {directory.absolute()} has one of `*`, `?`, `[` in it, which the store of "
            "checkpoints reads as a pattern; choose another"
        )
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"directory: {directory} is a file; name a directory for the run")
    names = {entry.name for entry in directory.iterdir()}
    foreign = sorted(names - {RECIPE, pretrained.TOKENIZER, pretrained.CHECKPOINTS, LOCK})
    if RECIPE not in names and foreign:
        raise ConfigError(
            f"directory: {directory} is not a run (it has `{foreign[0]}` and no {RECIPE}); choose "
            "another, or empty it"
        )


@contextlib.contextmanager
def signals() -> Iterator[Callable[[int], int | None]]:
    """While inside, SIGTERM and SIGINT ask the run to stop; the first of them is what the yielded
    function returns.

    It takes the number of the step, since several processes agree on it only every few steps. A
    second signal kills.
    """
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])
        log.info(
            "%s: saving and leaving after this step; once more leaves at once",
            signal.Signals(number).name,
        )

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda step: _agreed(received, step)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(received: list[int], step: int) -> int | None:
    mine = received[0] if received else 0
    if jax.process_count() > 1:
        if step % 8:
            return None
        mine = int(np.max(multihost_utils.process_allgather(np.int32(mine))))
    return mine or None


def _begin(built: Built) -> State:
    if built.start is None:
        return states.build(built.fresh, built.table, built.placement)[0]
    params = built.start.read(built.run.weights_dtype, built.where.weights)
    return states.build(built.begun, built.table, built.placement, params)[0]


def check_recipe(built: Built, manager: Manager) -> None:
    """Says what differs from the recipe of the newest checkpoint; refuses what may not."""
    home, saved = built.directory / pretrained.CHECKPOINTS, None
    for step in reversed(manager.steps()):
        try:
            saved = read_manifest(home / str(step)).recipe
            break
        except CheckpointError:
            continue  # `restore` passes over it too, and says so
    if saved is None:
        return
    old, new = flatten(saved), flatten(built.recipe)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key) and key != "directory"]
    told = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in changed]
    refused = [
        text
        for key, text in zip(changed, told, strict=True)
        if key.startswith(_FIXED) and key not in _FREE
    ]
    if refused:
        raise CheckpointError(
            f"{built.directory} was begun with another recipe: {'; '.join(refused)}. These cannot "
            "change in a run that goes "
            f"on; set them back, or choose another `directory`"
        )
    if told:
        log.info("going on with a changed recipe: %s", "; ".join(told))
