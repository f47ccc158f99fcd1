"""Compiled programs are kept between runs, in a directory that only its owner can write: it holds
code."""

import ctypes
import os
from pathlib import Path

import jax

from ropewalk.core.log import log
from ropewalk.core.storage import private_dir

_MOST_BYTES = 4 << 30


def programs_directory() -> Path:
    """Where compiled programs are kept: JAX_COMPILATION_CACHE_DIR, or the user's cache."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return Path(named) if named else _home() / "programs"


def kernels_directory() -> Path:
    """Where kernels that were built for this machine are kept: in the user's cache."""
    return _home() / "kernels"


def keep_programs() -> None:
    """Turns JAX's persistent compilation cache on.

    Where JAX_COMPILATION_CACHE_DIR is set, it says where; set and empty, it says that nothing is
    kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        directory = private_dir(programs_directory())
    except OSError as error:
        log.warning("compiled programs are not kept between runs: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # A bound makes JAX lock the directory, without which a killed writer leaves a broken entry.
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)


def release_compiler_memory() -> None:
    """Gives the memory that compiling freed back to the system, where the C library can.

    It is some 300 MB after a train step, which else stays with the process to its end.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ropewalk"
