"""Where text comes from: the recipe's `sources`, resolved to files or to the bundled corpus.

Knows paths and the configuration of a source; how a file's records are read is `formats`.
"""

import difflib
import glob
import stat
from importlib import resources
from pathlib import Path
from typing import Self

import pydantic

from ropewalk.core.config import Config
from ropewalk.core.errors import DataError

BUNDLED = "bundled:"


class Synthetic(Config):
    """Tokens out of nothing: every token has `branches` equally likely successors, so the best
    loss is log(branches) nats a token."""

    vocab_size: int = pydantic.Field(ge=2)
    documents: int = pydantic.Field(default=4096, ge=1)
    length: int = pydantic.Field(default=513, ge=2)
    branches: int = pydantic.Field(default=4, ge=1)


class Source(Config):
    """One source of documents: files (`path`) or `synthetic` tokens.

    `path` is a file, a glob, a list of them, or `bundled:NAME`. `column` is the key of the text in
    JSON and Parquet records. `weight` is this source's share of the text, in bytes, relative to the
    other sources.
    """

    path: str | tuple[str, ...] | None = None
    synthetic: Synthetic | None = None
    column: str = "text"
    weight: float = pydantic.Field(default=1.0, gt=0)

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.synthetic is None):
            raise ValueError("a source has either `path` or `synthetic`, and not both")
        return self


def resolve(path: str | tuple[str, ...]) -> list[Path]:
    """The files named by paths, globs and `bundled:NAME`, in a fixed order.

    Raises DataError when there is none, or when one is a directory, a pipe or a device, or is
    empty.
    """
    found: list[Path] = []
    for pattern in [path] if isinstance(path, str) else path:
        if pattern.startswith(BUNDLED):
            found.append(bundled(pattern.removeprefix(BUNDLED)))
        elif glob.has_magic(pattern):
            matches = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
            files = [Path(match) for match in matches if not Path(match).is_dir()]
            if not files:
                raise DataError(f"data: no file matches `{pattern}` (seen from {Path.cwd()})")
            found += files
        else:
            found.append(Path(pattern).expanduser())
    if not found:
        raise DataError("data: `path` is an empty list; name at least one file")
    for file in found:
        _check(file)
    return found


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


def _check(file: Path) -> None:
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(
            f"data file {file}: {error.strerror or error} (seen from {Path.cwd()})"
        ) from None
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
