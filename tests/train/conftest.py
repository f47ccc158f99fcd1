from collections.abc import Callable
from pathlib import Path

import pytest

from ropewalk.train.run import Run, read
from tests.e2e.commands import write_recipe


@pytest.fixture
def described(tmp_path: Path) -> Callable[..., Run]:
    """The tiny run with some overrides, in a directory of its own; nothing is held out."""
    recipe = write_recipe(tmp_path)
    quick = (
        "metrics.progress=none",
        "samples.every=null",
        "data.holdout=null",
        "evaluate.every=null",
        "optimizer.schedule={kind: constant}",
        f"directory={tmp_path / 'run'}",
    )
    return lambda *overrides: read(recipe, [*quick, *overrides])
