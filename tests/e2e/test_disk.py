"""A disk that is full: one paragraph, and the run goes on once there is room."""

import signal
from pathlib import Path

import pytest

from tests.e2e.commands import STEPS, Command, arrays, at_step, lines, numbers, same_bits


def _refused(command: Command) -> str:
    assert command.wait() == 2
    errors = [line for line in command.stderr.splitlines() if line.startswith("error: ")]
    assert command.stderr.splitlines()[-1:] == errors
    assert "Traceback" not in command.stderr
    return errors[0]


def _goes_on(words: tuple[str, ...], run: Path, whole: Path) -> None:
    command = Command(*words, log=run.with_suffix(".log"))
    assert command.wait() == 0, command.stderr
    assert "going on from step 5" in command.stderr
    assert numbers(run) == numbers(whole)
    assert same_bits(arrays(run, STEPS), arrays(whole, STEPS))


@pytest.mark.parametrize("full", ["checkpoint", "metrics"])
def test_full_disk(full: str, home: Path, whole: Path) -> None:
    run = home / f"full-{full}"
    words = ("train", str(home / "recipe.yml"), f"directory={run}")
    command = Command(*words, log=run.with_suffix(".log"))
    command.until(at_step(run, 6))
    command.until((run / "checkpoints" / "5").is_dir)
    command.send(signal.SIGKILL)
    command.wait()
    if full == "checkpoint":
        said = _refused(Command(*words, log=run.with_suffix(".log"), file_bytes=20_000))
        assert "checkpoint of step 10 could not be saved" in said
        assert "Checkpoints kept: 5" in said
    else:
        size = (run / "metrics.jsonl").stat().st_size
        late = (*words, "checkpoint.every=100")
        said = _refused(Command(*late, log=run.with_suffix(".log"), file_bytes=size + 1500))
        assert f"{run}: the run cannot go on" in said
        assert "same command goes on" in said
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["5"]
    assert lines(run)
    _goes_on(words, run, whole)
