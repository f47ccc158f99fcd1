"""Where a recipe is looked for."""

import json
from pathlib import Path

import pytest

from ropewalk.core.errors import ConfigError
from ropewalk.train.run import find


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert find("tiny").name == "tiny.yml"
    own = tmp_path / "own.yml"
    own.write_text(json.dumps({}))
    assert find(str(own)) == own
    with pytest.raises(ConfigError, match="did you mean `tiny`"):
        find("tinny")
