from pathlib import Path

import pytest

from tests.e2e import commands


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recipe, its data and compiled programs."""
    directory = tmp_path_factory.mktemp("lane")
    commands.write_recipe(directory)
    return directory


@pytest.fixture(scope="session")
def whole(home: Path) -> Path:
    """A run on one device that nothing happened to."""
    run = home / "whole"
    command = commands.Command(
        "train", str(home / "recipe.yml"), f"directory={run}", log=home / "whole.log"
    )
    if command.wait() != 0:
        raise RuntimeError(command.stderr)
    return run
