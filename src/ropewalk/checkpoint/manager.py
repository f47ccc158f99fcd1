"""Native checkpoints: written by Orbax in the background, whole or absent, verified when read.

A step is `DIRECTORY/<step>/`: arrays by path with their global shape, the same whatever the mesh,
device count or scan mode, and a `manifest.json` that is part of the commit. Knows no train state.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
import pydantic
from etils import epath
from jax.experimental import multihost_utils

from ropewalk.checkpoint import integrity
from ropewalk.core import config, paths
from ropewalk.core.errors import CheckpointError
from ropewalk.core.log import log

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

# Orbax's mark in the name of a directory that is not yet whole.
_HALF_WRITTEN = ".orbax-checkpoint-tmp"
_DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


class Config(config.Config):
    """Which checkpoints stay: the newest `keep_last`, every `keep_every`-th step, the best.

    `best_metric` names an entry of the metrics given to `save`; the best step by it stays.
    """

    keep_last: int = pydantic.Field(default=3, ge=1)
    keep_every: int | None = pydantic.Field(default=None, ge=1)
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: `state` is nested like the abstract state that was asked for."""

    step: int
    state: Any
    recipe: dict[str, Any]
    data_state: dict[str, Any]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Saving:
    manifest: integrity.Manifest
    arrays: dict[str, jax.ShapeDtypeStruct]
    sums: dict[str, jax.Array]


class Manager:
    """Saves and restores the steps of one directory; in a run of several processes all call alike.

    Only one run at a time may own a directory. Opening it removes what a killed save left behind.
    """

    def __init__(self, directory: epath.PathLike, keep: Config | None = None):
        self._directory = epath.Path(directory).absolute()
        self._keep = keep or Config()
        self._saving: _Saving | None = None
        self._damaged: set[int] = set()
        try:
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._remove_half_written()
        except OSError as error:
            raise CheckpointError(f"{directory} cannot hold checkpoints: {error}") from None
        _gather(None)  # nobody lists the directory before it is clean

    @cached_property
    def _checkpointer(self) -> "ocp.AsyncCheckpointer":
        options = _orbax().AsyncOptions(post_finalization_callback=self._commit)
        return _orbax().AsyncCheckpointer(_handler(), async_options=options)

    def save(
        self,
        step: int,
        state: Any,
        *,
        recipe: dict[str, Any],
        data_state: dict[str, Any],
        metrics: dict[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Writes a step in the background; returns once `state` may be donated.

        `state` is a nest of jax arrays. `data_state` of all processes is united. A step already
        there with the same contents is left alone. Raises CheckpointError when this save cannot
        begin or the one before it failed; with `wait`, also when this one fails.
        """
        self.wait()
        arrays = _flatten(state)
        manifest = integrity.Manifest(
            step, json.loads(json.dumps(recipe)), unite(_gather(data_state)), metrics or {}
        )
        sums = {path: integrity.checksum(array) for path, array in arrays.items()}
        abstract = {
            path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in arrays.items()
        }
        self._saving = _Saving(manifest, abstract, sums)
        if self._holds(self._saving):
            self._saving = None
            return
        try:
            self._check_space(arrays)
            self._checkpointer.save(
                self._directory / str(step), args=_orbax().args.PyTreeSave(arrays), force=True
            )
        except Exception as error:
            self._fail(error)
        if wait:
            self.wait()

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """The newest good step (from `step` down, when given), or None when there is no step.

        `abstract_state` is a nest of `jax.ShapeDtypeStruct` with shardings. A damaged step is
        passed over with a warning. Raises CheckpointError when every step is damaged, when the step
        asked for does not exist, and when the checkpoint is of another model.
        """
        self.wait()
        candidates = _gather(_directories(self._directory))[0]
        if step is not None and step not in candidates:
            raise CheckpointError(
                f"{self._directory} holds no checkpoint of step {step}; it holds "
                f"{', '.join(map(str, candidates)) or 'none'}"
            )
        candidates = [found for found in reversed(candidates) if step is None or found <= step]
        wanted = paths.flatten(abstract_state)
        reasons: dict[int, str] = {}
        for candidate in candidates:
            manifest, arrays, reason = self._attempt(candidate, wanted)
            if manifest is not None and reason is None:
                _warn_of_fallback(reasons, candidate)
                restored = paths.unflatten(abstract_state, arrays)
                return Restored(
                    candidate, restored, manifest.recipe, manifest.data_state, manifest.metrics
                )
            reasons[candidate] = reason or ""
            self._damaged.add(candidate)
        if not reasons:
            return None
        every = "; ".join(f"step {bad}: {reason}" for bad, reason in reasons.items())
        raise CheckpointError(f"{self._directory}: no checkpoint is whole: {every}")

    def steps(self) -> list[int]:
        """Steps that were committed and not found damaged, ascending."""
        return [step for step in steps(self._directory) if step not in self._damaged]

    def latest(self) -> int | None:
        """The newest of `steps()`."""
        return max(self.steps(), default=None)

    def wait(self) -> None:
        """Blocks until the save under way is committed. Raises CheckpointError when it failed."""
        if self._saving is None:
            return
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            self._fail(error)
        self._damaged.discard(self._saving.manifest.step)
        self._saving = None
        if jax.process_index() == 0:
            self._remove_surplus()

    def close(self) -> None:
        """Waits for the save under way and frees the writer's threads."""
        try:
            self.wait()
        finally:
            if "_checkpointer" in vars(self):
                self._checkpointer.close()

    def _commit(self) -> None:
        """Adds the manifest to a written step; Orbax calls it on process 0 before the rename."""
        saving = self._saving
        if saving is None:
            raise RuntimeError("Orbax committed a step that was not being saved")
        final = self._directory / str(saving.manifest.step)
        directory = self._checkpointer.get_temporary_path(final).get()
        manifest = dataclasses.replace(
            saving.manifest,
            arrays=integrity.records(saving.arrays, saving.sums),
            files=integrity.list_files(directory),
        )
        integrity.write_manifest(directory, manifest)

    def _holds(self, saving: _Saving) -> bool:
        """Whether the step is already there with the same contents."""
        step = saving.manifest.step
        if step in self._damaged or not _gather((self._directory / str(step)).exists())[0]:
            return False
        try:
            there = integrity.read_manifest(self._directory / str(step))
        except CheckpointError:
            return False
        mine = dataclasses.replace(
            saving.manifest,
            arrays=integrity.records(saving.arrays, saving.sums),
            files=there.files,
        )
        if there == mine:
            return True
        log.warning("checkpoint of step %d exists with other contents and is replaced", step)
        return False

    def _check_space(self, arrays: Mapping[str, jax.Array]) -> None:
        if "://" in str(self._directory):
            return
        needed = sum(array.nbytes for array in arrays.values())
        free = _gather(shutil.disk_usage(self._directory).free)[0]
        if free < needed:
            raise OSError(
                f"the disk is full: {needed} bytes are needed, {free} are free. Make room, keep "
                "fewer checkpoints, or move the run directory"
            )

    def _fail(self, error: Exception) -> None:
        step = self._saving.manifest.step if self._saving else None
        self._saving = None
        with contextlib.suppress(OSError):  # a writer may still be at it; the next start removes it
            if jax.process_index() == 0:
                self._remove_half_written()
        raise CheckpointError(
            f"{self._directory}: checkpoint of step {step} could not be saved: {_brief(error)}. "
            f"Checkpoints kept: {', '.join(map(str, self.steps())) or 'none'}"
        ) from error

    def _attempt(
        self, step: int, wanted: Mapping[str, Any]
    ) -> tuple[integrity.Manifest | None, dict[str, jax.Array], str | None]:
        """Manifest and verified arrays of one step, or the reason why it is no good."""
        directory = self._directory / str(step)
        manifest: integrity.Manifest | None = None
        arrays: dict[str, jax.Array] = {}
        reason = None
        try:
            manifest = integrity.read_manifest(directory)
            reason = "; ".join(integrity.damaged_files(directory, manifest)) or None
        except CheckpointError as error:
            reason = str(error)
        reason = _first(reason)
        if manifest is None or reason is not None:
            return manifest, {}, reason
        integrity.check_fits(manifest, wanted, str(directory))
        try:
            arrays = _read(directory, wanted)
        except Exception as error:
            reason = f"arrays cannot be read: {_brief(error)}"
        reason = _first(reason)
        if reason is None:
            reason = _damage(integrity.damaged_arrays(arrays, manifest))
        return manifest, arrays, reason

    def _remove_half_written(self) -> None:
        for path in self._directory.iterdir():
            if _HALF_WRITTEN in path.name:
                path.rmtree(missing_ok=True)

    def _remove_surplus(self) -> None:
        good = self.steps()
        scores = {}
        if self._keep.best_metric is not None:
            manifests = {
                step: integrity.read_manifest(self._directory / str(step)) for step in good
            }
            scores = {
                step: manifest.metrics[self._keep.best_metric]
                for step, manifest in manifests.items()
                if self._keep.best_metric in manifest.metrics
            }
        for step in surplus(good, self._keep, scores):
            (self._directory / str(step)).rmtree(missing_ok=True)


def steps(directory: epath.PathLike) -> list[int]:
    """The committed steps below a directory, ascending; reads only names."""
    root = epath.Path(directory)
    return [step for step in _directories(root) if (root / str(step) / integrity.MANIFEST).exists()]


def read_arrays(directory: epath.PathLike, prefix: str = "") -> dict[str, np.ndarray]:
    """Verified arrays of one step's directory whose path begins with `prefix.`, in host memory.

    The prefix is dropped from the paths; with no prefix all arrays come. Raises CheckpointError.
    """
    step = epath.Path(directory).absolute()
    manifest = integrity.read_manifest(step)
    damage = integrity.damaged_files(step, manifest)
    if damage:
        raise CheckpointError(f"{step} is damaged: {'; '.join(damage)}")
    start = f"{prefix}." if prefix else ""
    chosen = {path: record for path, record in manifest.arrays.items() if path.startswith(start)}
    try:
        arrays = _read(step, dict.fromkeys(chosen))
    except Exception as error:
        raise CheckpointError(f"{step}: arrays cannot be read: {_brief(error)}") from error
    reason = _damage(integrity.damaged_arrays(arrays, manifest))
    if reason:
        raise CheckpointError(f"{step} is damaged: {reason}")
    return {path.removeprefix(start): array for path, array in arrays.items()}


def surplus(steps: list[int], keep: Config, scores: Mapping[int, float]) -> list[int]:
    """Which of the ascending `steps` the keep-policy lets go; `scores` holds the best-metric."""
    kept = set(steps[-keep.keep_last :])
    if keep.keep_every is not None:
        kept.update(step for step in steps if step % keep.keep_every == 0)
    if scores:
        best = min if keep.best_mode == "min" else max
        kept.add(best(scores, key=lambda step: scores[step]))
    return [step for step in steps if step not in kept]


def unite(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The union of every process's mapping, nested mappings united alike.

    Raises CheckpointError naming the key when two processes disagree on a value.
    """
    united: dict[str, Any] = {}
    for part in states:
        _merge(united, part, "")
    return united


def _merge(into: dict[str, Any], part: dict[str, Any], prefix: str) -> None:
    for key, value in part.items():
        there = into.setdefault(key, {} if isinstance(value, dict) else value)
        if isinstance(value, dict) and isinstance(there, dict):
            _merge(there, value, f"{prefix}{key}.")
        elif there != value:
            raise CheckpointError(
                f"processes disagree on the data state: `{prefix}{key}` is {there!r} on one "
                f"and {value!r} on another, so there is no one state to save"
            )


def _gather(value: Any) -> list[Any]:
    """A JSON value of every process, in process order; also a barrier."""
    data = json.dumps(value).encode("ascii")
    if jax.process_count() == 1:
        return [json.loads(data)]
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


def _first(reason: str | None) -> str | None:
    """The first process's reason that is not None, so that all go the same way."""
    return next((found for found in _gather(reason) if found is not None), None)


@cache
def _orbax() -> Any:
    """Orbax, imported at the first save or restore, and quiet: it logs a failed write up to ten
    times with its traceback; it also raises it, and so do we."""
    import orbax.checkpoint as ocp  # start-up time

    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    return ocp


def _handler() -> "ocp.PyTreeCheckpointHandler":
    """Uncompressed: random mantissas shrink by 8 % at a fifth of the speed (measured)."""
    return _orbax().PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)


def _read(
    directory: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct | None]
) -> dict[str, Any]:
    """Reads arrays as `wanted` describes and places them, or into numpy where it says None.

    Without Orbax's barriers, where one process's failure would hang the others.
    """
    if not wanted:
        return {}
    ocp = _orbax()

    def argument(leaf: jax.ShapeDtypeStruct | None) -> Any:
        if leaf is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(wanted, 0),
        restore_args={path: argument(leaf) for path, leaf in wanted.items()},
        partial_restore=True,
    )
    return _handler().restore(directory, args=args)


def _flatten(state: Any) -> dict[str, jax.Array]:
    arrays = paths.flatten(state)
    if len(arrays) != len(jax.tree.leaves(state)):
        raise CheckpointError("two arrays of the train state have the same path; rename one")
    empty = [path for path, array in arrays.items() if array.size == 0]
    if empty:
        raise CheckpointError(f"array {empty[0]} has no elements; Orbax cannot store it, drop it")
    return arrays


def _directories(root: epath.Path) -> list[int]:
    names = [path.name for path in root.iterdir()] if root.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def _damage(arrays: list[str]) -> str | None:
    if not arrays:
        return None
    more = f" and {len(arrays) - 5} more" if len(arrays) > 5 else ""
    return f"checksum differs in array {', '.join(arrays[:5])}{more}"


def _warn_of_fallback(reasons: dict[int, str], chosen: int) -> None:
    for bad, reason in reasons.items():
        log.warning("checkpoint of step %d is damaged: %s; step %d is used", bad, reason, chosen)


def _brief(error: BaseException) -> str:
    """Type and first line of an error of Orbax, cut where it is long.

    The system's own word for it ("No space left on device") comes first, wherever it stood.
    """
    line = (str(error).strip().splitlines() or [""])[0]
    text = line if len(line) <= 400 else f"{line[:150]} ... {line[-250:]}"
    said = next((os.strerror(n) for n in _DISK_ERRORS if os.strerror(n) in str(error)), None)
    cause = f"{said}: " if said is not None and said not in text else ""
    return f"{cause}{type(error).__name__}: {text}"
