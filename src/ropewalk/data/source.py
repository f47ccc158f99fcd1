"""Where text comes from: the recipe's `sources`, resolved to files or to the bundled corpus.

Knows paths and the configuration of a source; how a file's records are read is `formats`.
"""

import difflib
import glob
import hashlib
import os
import stat
from importlib import resources
from pathlib import Path
from typing import Self

import pydantic

from ropewalk.core.config import Config
from ropewalk.core.errors import DataError

BUNDLED = "bundled:"
# How much of a file its fingerprint reads: all of it up to BLOCKS blocks, else so many, spread out.
BLOCKS = 16
BLOCK_BYTES = 1 << 20


class Synthetic(Config):
    """Tokens out of nothing: every token has `branches` equally likely successors, so the best
    loss is log(branches) nats a token."""

    vocab_size: int = pydantic.Field(ge=2)
    documents: int = pydantic.Field(default=4096, ge=1)
    length: int = pydantic.Field(default=513, ge=2)
    branches: int = pydantic.Field(default=4, ge=1)


class Source(Config):
    """One source of documents: files (`path`) or `synthetic` tokens.

    `path` is a file, a glob, a list of them, or `bundled:NAME`, as seen from the working directory
    or else from the recipe's. `column` is the key of the text in JSON and Parquet records. `weight`
    is this source's share of the text, in bytes, relative to the other sources.
    """

    path: str | tuple[str, ...] | None = None
    synthetic: Synthetic | None = None
    column: str = "text"
    weight: float = pydantic.Field(default=1.0, gt=0)
    _folder: Path = pydantic.PrivateAttr(default=Path())

    @pydantic.model_validator(mode="after")
    def _one_origin(self, info: pydantic.ValidationInfo) -> Self:
        if (self.path is None) == (self.synthetic is None):
            raise ValueError("a source has either `path` or `synthetic`, and not both")
        self._folder = _home((info.context or {}).get("source", "")).parent
        return self

    def files(self) -> list[Path]:
        """The files of `path`, see `resolve`; none of a synthetic source."""
        return [] if self.path is None else resolve(self.path, self._folder)


def resolve(path: str | tuple[str, ...], folder: Path = Path()) -> list[Path]:
    """The files named by paths, globs and `bundled:NAME`, in a fixed order.

    A relative one is looked for from the working directory, and then from `folder`. Raises
    DataError when there is none, or when one is a directory, a pipe or a device, or is empty.
    """
    found: list[Path] = []
    for pattern in [path] if isinstance(path, str) else path:
        if pattern.startswith(BUNDLED):
            found.append(bundled(pattern.removeprefix(BUNDLED)))
        else:
            found += _matches(pattern, folder)
    if not found:
        raise DataError("data: `path` is an empty list; name at least one file")
    for file in found:
        _check(file)
    return found


def fingerprint(file: Path) -> str:
    """A hash of a file's content and size; of a large file, of its head, tail and blocks between.

    Raises DataError when it cannot be read.
    """
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            last = max(size - BLOCK_BYTES, 0)
            digest = hashlib.blake2b(str(size).encode(), digest_size=8)
            for block in range(BLOCKS):
                # of a small file these are consecutive, and those past its end empty
                spread = last * block // (BLOCKS - 1)
                handle.seek(spread if size > BLOCKS * BLOCK_BYTES else block * BLOCK_BYTES)
                digest.update(handle.read(BLOCK_BYTES))
    except OSError as error:
        raise DataError(f"data file {file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def bundled(name: str) -> Path:
    """The file of a corpus that comes with the package. Raises DataError naming those that
    exist."""
    folder = Path(str(resources.files("ropewalk") / "recipes" / "corpus"))
    files = {file.name.partition(".")[0]: file for file in sorted(folder.glob("*.jsonl.*"))}
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there is {', '.join(files)}"
        raise DataError(f"no corpus `{name}` comes with ropewalk; {hint}")
    return files[name]


def _matches(pattern: str, folder: Path) -> list[Path]:
    typed, magic = _home(pattern), glob.has_magic(pattern)
    for start in (Path(), folder):
        if magic:
            matches = sorted(glob.glob(str(Path(glob.escape(str(start))) / typed), recursive=True))
            files = [Path(match) for match in matches if not Path(match).is_dir()]
        else:
            files = [start / typed] if os.path.lexists(start / typed) else []
        if files:
            return files
    places = dict.fromkeys([Path.cwd(), folder.absolute()])
    seen = "" if typed.is_absolute() else f" (seen from {' and from '.join(map(str, places))})"
    if magic:
        raise DataError(f"data: no file matches `{pattern}`{seen}")
    try:
        typed.stat()
    except OSError as error:
        raise DataError(f"data file {typed}: {error.strerror or error}{seen}") from None
    return [typed]


def _home(path: str) -> Path:
    """A path with `~` and `~name` resolved; a name that starts with `~` and is no user's stays."""
    return Path(os.path.expanduser(path))


def _check(file: Path) -> None:
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"data file {file}: {error.strerror or error}") from None
    if stat.S_ISDIR(status.st_mode):
        raise DataError(
            f"data file {file} is a directory; name the files in it, e.g. {file}/*.jsonl"
        )
    if not stat.S_ISREG(status.st_mode):
        raise DataError(
            f"data file {file} is a pipe or a device; data is read more than once, so save it first"
        )
    if status.st_size == 0:
        raise DataError(f"data file {file} is empty (0 bytes)")
