"""One device, eight simulated ones, two processes: the same losses, to rounding."""

import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.commands import STEPS, Command, arrays, at_step, lines, numbers

# Sums over devices are taken in another order, and 24 steps of Adam amplify the last bit.
CLOSE = 1e-4


def train(home: Path, run: Path, processes: int = 1, devices: int = 1, *more: str) -> list[Command]:
    """One command a process, joined where there are several."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    joined = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    arguments = ("train", str(home / "recipe.yml"), f"directory={run}", *more)
    return [
        Command(
            *arguments,
            log=home / f"{run.name}-{number}.log",
            devices=devices,
            environment={**joined, "JAX_PROCESS_ID": str(number)} if processes > 1 else None,
        )
        for number in range(processes)
    ]


@pytest.mark.parametrize("rules", ["fsdp", "tensor", "fsdp_tensor"])
def test_rule_tables_on_eight_devices(rules: str, home: Path, whole: Path) -> None:
    run = home / rules
    (command,) = train(home, run, 1, 8, f"layout={rules}")
    assert command.wait() == 0, command.stderr
    assert lines(run)[0]["devices"] == 8
    _close(run, whole)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_processes_come_and_go(before: int, after: int, home: Path, whole: Path) -> None:
    run = home / f"from-{before}-to-{after}"
    commands = train(home, run, before)
    commands[0].until(at_step(run, 6))
    for command in commands:
        command.send(signal.SIGTERM)
    assert {command.wait() for command in commands} == {128 + signal.SIGTERM}
    commands = train(home, run, after)
    assert [command.wait() for command in commands] == [0] * after, commands[0].stderr
    started = [row for row in lines(run) if row.get("event") == "started"]
    assert [row["processes"] for row in started] == [before, after]
    _close(run, whole)


def _close(run: Path, whole: Path) -> None:
    ours, theirs = numbers(run), numbers(whole)
    assert list(ours) == list(theirs)
    for step in theirs:
        assert ours[step] == pytest.approx(theirs[step], rel=CLOSE, abs=1e-6)
    mine, others = arrays(run, STEPS), arrays(whole, STEPS)
    assert mine.keys() == others.keys()
    for path in others:
        if path.startswith("params."):
            np.testing.assert_allclose(mine[path], others[path], atol=2e-3)
