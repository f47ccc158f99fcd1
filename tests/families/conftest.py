"""Keeps the tests of one model on one worker, which then compiles its programs once."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is tested here by a `name` belongs to the group of that name."""
    for item in items:
        if isinstance(item, pytest.Function) and Path(__file__).parent in item.path.parents:
            name = getattr(item, "callspec", None) and item.callspec.params.get("name")
            if name:
                item.add_marker(pytest.mark.xdist_group(str(name)))
