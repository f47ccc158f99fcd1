"""How much memory there is."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CGROUP = Path("/sys/fs/cgroup")


def physical_memory() -> int:
    """Bytes that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(devices: Sequence[Any]) -> int:
    """Bytes that can still be had on every one of some jax devices: of their own memory where they
    tell, else each its part of the machine's, or of what this process may have of it."""
    told = [device.memory_stats() for device in devices]
    each = [one["bytes_limit"] - one["bytes_in_use"] for one in told if one]
    return min(each) if each else _machine() // len(devices)


def _machine() -> int:
    free = physical_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
        most, used = (_CGROUP / f"memory.{name}" for name in ("max", "current"))
        return min(free, int(most.read_text()) - int(used.read_text()))
    except (OSError, ValueError, StopIteration):
        return free  # another system, or no limit
