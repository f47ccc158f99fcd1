"""A run that was killed, stopped or damaged ends as if nothing had happened: bit for bit."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.commands import STEPS, Command, arrays, at_step, lines, numbers, same_bits

Train = Callable[[], Command]


@pytest.fixture
def run(home: Path, request: pytest.FixtureRequest) -> Path:
    return home / request.node.name.translate(dict.fromkeys(map(ord, "[]*/"), "-"))


@pytest.fixture
def train(home: Path, run: Path) -> Train:
    return lambda: Command(
        "train", str(home / "recipe.yml"), f"directory={run}", log=run.with_suffix(".log")
    )


def test_kill_at_random_moments(train: Train, run: Path, whole: Path) -> None:
    source = random.Random(0)
    for step in (1, 7, 13, 19):
        command = train()
        command.until(at_step(run, step))
        time.sleep(source.uniform(0, 0.05))
        command.send(signal.SIGKILL)
        assert command.wait() in (-signal.SIGKILL, 0)  # 0: it was faster
    assert train().wait() == 0
    _equal(run, whole)


def test_kill_inside_saves(train: Train, run: Path, whole: Path) -> None:
    for step in (5, 10, 20):
        command = train()
        command.until(lambda step=step: _saving(run, step))
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        assert _saving(run, step)  # the kill came before the commit
    assert train().wait() == 0
    assert not any(_saving(run, step) for step in (5, 10, 20))
    _equal(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves(
    number: signal.Signals, train: Train, run: Path, whole: Path
) -> None:
    command = train()
    command.until(at_step(run, 6))
    command.send(number)
    assert command.wait() == 128 + number
    stopped = lines(run)[-1]
    assert (stopped["event"], stopped["signal"]) == ("stopped", number.name)
    assert (run / "checkpoints" / str(stopped["step"])).is_dir()
    assert f"stopped at step {stopped['step']} and saved" in command.stdout
    command = train()
    assert command.wait() == 0
    assert f"going on from step {stopped['step']} of {STEPS}" in command.stderr
    _equal(run, whole)


def test_signal_during_an_evaluation_step(train: Train, run: Path, whole: Path) -> None:
    command = train()
    command.until(at_step(run, 7))  # the row of 7 is written while step 8, an evaluation, runs
    command.send(signal.SIGTERM)
    command.wait()
    assert train().wait() == 0
    _equal(run, whole)


@pytest.mark.parametrize("file", ["manifest.json", "d/*"])
def test_flipped_bit_falls_back(file: str, train: Train, run: Path, whole: Path) -> None:
    command = train()
    command.until(at_step(run, 12))
    command.send(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM
    newest = run / "checkpoints" / str(lines(run)[-1]["step"])
    path = max(newest.glob(file), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    command = train()
    assert command.wait() == 0
    assert f"checkpoint of step {newest.name} is damaged" in command.stderr
    assert "going on from step 10" in command.stderr
    _equal(run, whole)


def _saving(run: Path, step: int) -> bool:
    return any((run / "checkpoints").glob(f"{step}.*tmp*"))


def _equal(run: Path, whole: Path) -> None:
    assert numbers(run) == numbers(whole)
    assert list(numbers(run)) == list(range(1, STEPS + 1))
    assert same_bits(arrays(run), arrays(whole))
