"""`import ropewalk` and `ropewalk --help` answer at once: no array library, little CPU time."""

import json
import subprocess
import sys

import pytest

CPU_LIMIT_S = 0.5
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "torch", "transformers", "tensorflow"}

IMPORT = "import ropewalk\n"
HELP = """
import contextlib, io, sys
from ropewalk.cli import main
sys.argv = ["ropewalk", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    main()
if "train" not in shown.getvalue():
    sys.exit("ropewalk --help shows no command: " + shown.getvalue())
"""
REPORT = """
import json, sys, time
print(json.dumps([time.process_time(), sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def cpu_and_modules(code: str) -> tuple[float, set[str]]:
    done = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cpu_s, modules = json.loads(done.stdout.splitlines()[-1])
    return cpu_s, set(modules)


@pytest.mark.parametrize("code", [IMPORT, HELP], ids=["import", "help"])
def test_start_is_light(code: str) -> None:
    runs = [cpu_and_modules(code) for _ in range(3)]
    loaded = runs[0][1] & HEAVY
    assert not loaded
    assert min(cpu_s for cpu_s, _ in runs) < CPU_LIMIT_S
