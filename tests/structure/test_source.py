"""Holds src/ropewalk and tests to the rules of the house."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.structure import rules

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "ropewalk"


def read(folder: Path) -> list[rules.Source]:
    return [
        rules.Source(path.relative_to(folder), path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    ]


def report(rule: rules.Rule, sources: Iterable[rules.Source]) -> str:
    return "\n".join(itertools.chain.from_iterable(map(rule, sources)))


@pytest.fixture(scope="module")
def sources() -> list[rules.Source]:
    return read(PACKAGE)


@pytest.mark.parametrize("rule", rules.SOURCE_RULES, ids=lambda rule: rule.__name__)
def test_source_keeps_the_rule(rule: rules.Rule, sources: list[rules.Source]) -> None:
    broken = report(rule, sources)
    assert not broken, f"src/ropewalk breaks {rule.__name__}:\n{broken}"


def test_a_family_is_named_only_in_its_own_file(sources: list[rules.Source]) -> None:
    families = {
        source.path.stem
        for source in sources
        if source.path.parent == Path("models") and not source.path.stem.startswith("_")
    }
    assert families, "no family found in src/ropewalk/models"
    broken = report(rules.family_name(families), sources)
    assert not broken, f"a family's name outside its own file:\n{broken}"


def test_tests_are_skipped_only_for_missing_hardware() -> None:
    broken = report(rules.skipped_test, read(ROOT / "tests"))
    assert not broken, f"tests that do not run:\n{broken}"
