"""The options of a run; as a program (`make options`) lists them in options.txt."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from ropewalk.core.config import leaf_fields
from ropewalk.train.run import Run

LIST = Path(__file__).with_suffix(".txt")


def options() -> Iterator[tuple[str, bool]]:
    """Every option as (dotted name, whether it is a boolean), in the order of the recipe."""
    for name, annotation in dict(leaf_fields(Run)).items():
        yield name, bool in _types(annotation)


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)


if __name__ == "__main__":
    LIST.write_text("".join(f"{name}\n" for name, _ in options()))
