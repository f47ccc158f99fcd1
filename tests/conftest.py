"""Sets what jax reads at its start: eight simulated CPU devices, machine code made in a hurry.

What the environment already names is kept, e.g. JAX_PLATFORMS=cuda to run the tests on a GPU.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = {
        "--xla_force_host_platform_device_count": 8,
        # Compiling is most of a test's time. Only machine code is left unoptimized, half the time
        # to make and twice the time to run; XLA's own passes, and so the sums, stay the same.
        "--xla_backend_optimization_level": 0,
    }
    added = [f"{flag}={value}" for flag, value in wanted.items() if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *added]).strip()

import jax
import pytest

# A process may have 65530 memory maps, every compiled program takes a few, and XLA falls over when
# there are no more.
_MAPS = 30_000


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Lets go of compiled programs before there are too many."""
    yield
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps", "rb") as maps:
            count = sum(1 for _ in maps)
        if count > _MAPS:
            jax.clear_caches()
