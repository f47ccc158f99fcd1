"""Sets what jax reads at its start: eight simulated CPU devices, machine code made in a hurry.

What the environment already names is kept, e.g. JAX_PLATFORMS=cuda to run the tests on a GPU.
"""

import gc
import os
import re
from pathlib import Path
from typing import Any

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
from xdist.scheduler import LoadScopeScheduling

# A process may have 65530 memory maps, every compiled program takes a few, and XLA falls over when
# there are no more.
_MAPS, _PROGRAMS = 30_000, 100
_FAMILIES = {path.stem for path in Path(__file__).parents[1].glob("src/ropewalk/models/[!_]*.py")}
_SERVER = re.compile(r"tests/serve/test_(server|service|states|responses|bad_input)\.py")


# Modules stay; what jax makes is looked through for garbage less often, a twentieth of all time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)
_compiled = 0


@jax.monitoring.register_event_duration_secs_listener
def _count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _compiled
    _compiled += event.endswith("backend_compile_duration")


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Lets go of compiled programs before there are too many."""
    global _compiled
    yield
    # Counting takes up to 40 ms.
    if _compiled >= _PROGRAMS and os.path.exists("/proc/self/maps"):
        _compiled = 0
        with open("/proc/self/maps", "rb") as maps:
            count = sum(1 for _ in maps)
        if count > _MAPS:
            jax.clear_caches()
            gc.collect()


class Together(LoadScopeScheduling):
    """Tests that run the same compiled programs go to one worker, all others wherever there is
    room: those of one family, of one family's engine, and of the server."""

    def _split_scope(self, nodeid: str) -> str:
        if _SERVER.match(nodeid):
            return "server"
        place, _, parameters = nodeid.partition("[")
        room = place.rpartition("/")[0]
        if room in ("tests/families", "tests/serve"):
            for name in parameters.rstrip("]").split("-"):
                if name in _FAMILIES:
                    return f"{room} {name}"
        return nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    """How tests are given to workers."""
    return Together(config, log)
