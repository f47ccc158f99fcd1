"""Kernels for CPUs, in C++ (`cpu.cc`): built once by the machine's own compiler, kept in the
user's cache, called by compiled programs. Without a compiler XLA's own code does the same, slower.
"""

import atexit
import ctypes
import functools
import hashlib
import importlib.metadata
import platform as machine
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ropewalk.core.compilation import kernels_directory
from ropewalk.core.log import log
from ropewalk.core.storage import private_dir, write_atomic
from ropewalk.parallel.axes import platform

MOST_ROWS = 64
"""rows from which on XLA's products are as fast"""
_SOURCE = Path(__file__).with_suffix(".cc")
_ARM = machine.machine() in ("arm64", "aarch64")
_FLAGS = (
    "-std=c++17", "-O3", "-mcpu=native" if _ARM else "-march=native", "-shared", "-fPIC", "-w",
)  # fmt: skip
_NAME = "ropewalk"
_LOCK = threading.Lock()
_COMPILERS = "c++", "g++", "clang++"


def ready() -> bool:
    """Whether the program being traced may call these kernels: it is for a CPU, alone (a call
    cannot be split over several), and they are built, now if never before."""
    return platform() == "cpu" and jax.device_count() == 1 and built() is None


def built() -> str | None:
    """Builds and registers the kernels. Returns None, or why there are none."""
    with _LOCK:
        return _built()


@functools.cache
def _built() -> str | None:
    reasons = []
    for compiler in filter(None, map(shutil.which, _COMPILERS)):
        try:
            register(_NAME, library(compiler))
            return None
        except subprocess.CalledProcessError as error:
            reasons.append(f"{compiler} refuses their source: {error.stderr.strip()[-500:]}")
        except (OSError, subprocess.SubprocessError, RuntimeError, AttributeError) as error:
            reasons.append(f"they cannot be built by {compiler}: {error}")
    none = f"no C++ compiler ({', '.join(_COMPILERS)}) is on PATH"
    reason = "; ".join(dict.fromkeys(reasons)) or none
    log.warning(
        "kernels for this CPU are missing: %s. Decoding in bfloat16 takes up to twice as long",
        reason,
    )
    return reason


def register(name: str, path: Path) -> None:
    """Makes the kernels of a library known to XLA as `name`.rows and `name`.attend."""
    found = ctypes.CDLL(str(path))
    for kernel in ("rows", "attend"):
        handler = jax.ffi.pycapsule(getattr(found, f"ropewalk_{kernel}"))
        jax.ffi.register_ffi_target(f"{name}.{kernel}", handler, platform="cpu")


@jax.custom_jvp
def rows(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x bfloat16 [m, in] times weight bfloat16 [out, in], summed in float32: bfloat16 [m, out].

    A row's bits do not depend on the rows beside it.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype)
    return jax.ffi.ffi_call(f"{_NAME}.rows", shape, vmap_method="sequential")(x, weight)


@rows.defjvp
def _rows_jvp(primals, tangents):
    (x, weight), (d_x, d_weight) = primals, tangents
    dims = (((1,), (1,)), ((), ()))
    d_y = jax.lax.dot_general(d_x, weight, dims) + jax.lax.dot_general(x, d_weight, dims)
    return rows(x, weight), d_y


def attend(
    q: jax.Array,
    pools: tuple[jax.Array, jax.Array],
    scales: tuple[jax.Array, ...],
    seen: tuple[jax.Array, jax.Array, jax.Array],
    queries: tuple[jax.Array, jax.Array],
    count: jax.Array,
    sinks: jax.Array,
    near: tuple[int | None, int | None],
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """Attention over pages where they lie, the softmax in float32 with a running maximum and
    normaliser, arXiv:1805.02867.

    q [b, k, r, h], whose row i is a query at time i % t; pools keys [p, k, size, h] and values
    [p, k, size, g] in q's dtype, or int8 with scales float32 [p, k, size] each; seen: of each row
    its pages int32 [b, m], and the positions and owners int32 [b, m * size] of their places, as in
    a View, of which `count` int32 [] columns are looked at; queries: positions and segments int32
    [b, t]; sinks float32 [k, r]; near: window and chunk. Returns [b, k, r, g]; 0 for a query that
    sees nothing, or a page that is none.
    """
    none = jnp.zeros(0, jnp.float32)
    shape = jax.ShapeDtypeStruct((*q.shape[:3], pools[1].shape[3]), q.dtype)
    call = jax.ffi.ffi_call(f"{_NAME}.attend", shape)
    window, chunk = (np.int32(each or 0) for each in near)
    return call(
        q, *pools, *(scales or (none, none)), *seen, *queries, count, sinks,
        scale=np.float32(scale), soft_cap=np.float32(soft_cap or 0), window=window, chunk=chunk,
    )  # fmt: skip


def library(compiler: str, flags: tuple[str, ...] = _FLAGS) -> Path:
    """The library, built if it was not yet; its name says from what, by whom and for which
    processor. Raises OSError or SubprocessError."""
    include = jax.ffi.include_dir()
    version, jaxlib = _run(compiler, "--version"), importlib.metadata.version("jaxlib")
    parts = [_SOURCE.read_text(), " ".join(flags), version, jaxlib, _processor()]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    try:
        directory = private_dir(kernels_directory())
    except (OSError, RuntimeError):  # no home, or not ours to write to
        directory = Path(tempfile.mkdtemp(prefix="ropewalk"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    path = directory / f"{name}.so"
    if not path.exists():
        log.info("building kernels for this CPU, once")
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / path.name
            _run(compiler, *flags, "-I", include, str(_SOURCE), "-o", str(made))
            write_atomic(path, made.read_bytes())
    return path


def _processor() -> str:
    """What the processor can do: a home may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = {line for line in lines if line.lower().startswith(("flags", "features"))}
    return "\n".join([machine.machine(), machine.processor(), *sorted(flags)])


def _run(*command: str) -> str:
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return told.stdout
