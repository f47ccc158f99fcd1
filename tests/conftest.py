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
