"""Files that are either whole or absent: written beside their place, flushed, then renamed. And
files of others, read only where they are regular ones."""

import contextlib
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ropewalk.core.errors import UserError

LOCK = ".lock"
_KINDS = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFDIR: "directory",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFSOCK: "socket",
}


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def private_dir(path: str | Path) -> Path:
    """Creates a directory that only its owner can enter, and returns it; used for caches that hold
    code."""
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


@contextlib.contextmanager
def owned(directory: str | Path) -> Iterator[None]:
    """While inside, no other process may own the directory; a killed owner leaves it free. Raises
    UserError when one does."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{path}: another process is running there; wait for it, stop it, or choose "
                "another `directory`"
            ) from None
        yield


def regular_file(path: Path, root: Path | None = None) -> Path:
    """The path with links resolved. Raises UserError unless it is a regular file, and inside `root`
    where one is given.

    In a hub cache (`models--NAME/snapshots/REVISION`) the links into the same model's `blobs` are
    inside.
    """
    try:
        real, home = path.resolve(strict=True), None if root is None else root.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if home is not None:
        if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
            home = home.parent.parent
        if not real.is_relative_to(home):
            raise UserError(
                f"{path}: leads to {real}, outside of {home}; put the file itself there (cp -L)"
            )
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "special file")
        raise UserError(f"{path}: is a {kind}, not a regular file; put the file itself there")
    return real


def read_bytes(path: Path, root: Path | None = None) -> bytes:
    """What `regular_file` holds. Raises UserError when it cannot be read."""
    real = regular_file(path, root)
    try:
        return real.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_json(path: Path, root: Path | None = None) -> dict[str, Any]:
    """A JSON object from a regular file. Raises UserError with file and line when it is not one."""
    content = read_bytes(path, root)
    try:
        values = json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: holds a JSON {type(values).__name__}, expected an object")
    return values
