"""`--help` explains everything that can be given."""

from collections.abc import Iterator
from typing import Any

import typer

from ropewalk import cli


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {word}")


def test_every_option_argument_and_command_has_a_help_text() -> None:
    found = list(commands(typer.main.get_command(cli.app), "ropewalk"))
    assert len(found) > 10
    silent = [name for name, command in found if not command.help]
    silent += [
        f"{name} {parameter.name}"
        for name, command in found
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert silent == []
