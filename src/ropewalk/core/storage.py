"""Files that are either whole or absent: written beside their place, flushed, then renamed."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ropewalk.core.errors import UserError

LOCK = ".lock"


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
