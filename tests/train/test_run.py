"""Where a recipe is looked for."""

import json
from pathlib import Path

import pytest

from ropewalk.core.errors import ConfigError
from ropewalk.train.run import find, read
from tests.e2e.commands import write_recipe


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert find("tiny").name == "tiny.yml"
    own = tmp_path / "own.yml"
    own.write_text(json.dumps({}))
    assert find(str(own)) == own
    with pytest.raises(ConfigError, match="did you mean `tiny`"):
        find("tinny")


def test_a_bare_model_is_a_preset(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for words in (["model=smollm2-135m"], ["model.preset=smollm2-135m"]):
        assert read(recipe, words).model["preset"] == "smollm2-135m"
    changed = read(recipe, ["model=smollm2-135m", "model.num_hidden_layers=2"]).model
    assert changed == {"preset": "smollm2-135m", "num_hidden_layers": 2}
