"""`ropewalk.train` as a script calls it."""

from typing import Any

import pytest

from ropewalk import train as room
from ropewalk.core.errors import ConfigError

train: Any = room


@pytest.mark.parametrize("overrides", ["steps=3", b"steps=3", {"steps": 3}, None, 3, [3], [b"a=1"]])
def test_overrides_are_a_list_of_texts(overrides: Any) -> None:
    with pytest.raises(ConfigError, match=r"overrides is .*give a list of texts, e\.g\. \["):
        train("no such recipe", overrides)


@pytest.mark.parametrize("recipe", [None, 5, b"tiny", {"steps": 3}])
def test_a_recipe_is_named(recipe: Any) -> None:
    with pytest.raises(ConfigError, match="recipe is named by a text or a path"):
        train(recipe)
