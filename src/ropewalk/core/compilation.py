"""Compiled programs are kept between runs, in a directory that only its owner can write: it holds code."""

import os
from pathlib import Path

import jax

from ropewalk.core.log import log
from ropewalk.core.storage import private_dir


def keep_programs() -> None:
    """Turns JAX's persistent compilation cache on, unless JAX_COMPILATION_CACHE_DIR already says where (or, empty, not)."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    try:
        directory = private_dir(home / "ropewalk" / "programs")
    except OSError as error:
        log.warning("compiled programs are not kept between runs: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
