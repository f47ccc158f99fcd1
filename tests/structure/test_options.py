"""The options of a run are counted and listed: a new one is seen in review."""

from tests.structure.options import LIST, options

OPTIONS = 150
BOOLEANS = 15


def test_options_are_the_listed_ones() -> None:
    listed = LIST.read_text().split()
    assert [name for name, _ in options()] == listed, "run `make options` and read the difference"


def test_options_are_few() -> None:
    found = list(options())
    assert len(found) <= OPTIONS
    assert sum(boolean for _, boolean in found) <= BOOLEANS
