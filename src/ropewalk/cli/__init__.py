"""The command line: one thin file a command. Everything heavy is imported inside the command that
needs it."""

import sys
from typing import Any

import typer

from ropewalk.cli import (
    chat,
    data,
    doctor,
    export,
    generate,
    inspect,
    serve,
    tokenizer,
    train,
    verify,
)
from ropewalk.cli import import_ as importing
from ropewalk.core.errors import UserError
from ropewalk.core.log import setup

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, tune and run language models, from random weights to a served model. Results go "
    "to stdout, progress to stderr; a mistake ends with one paragraph and exit code 2 "
    "(add --debug for the traceback).",
)
app.command()(train.train)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(export.export)
app.command("import")(importing.import_)
app.command()(inspect.inspect)
app.command()(verify.verify)
app.command()(data.data)
app.add_typer(tokenizer.app, name="tokenizer")
app.command()(doctor.doctor)


def main() -> None:
    """Runs the command in sys.argv and exits: 0 on success, 2 with one paragraph on a user's
    mistake."""
    debug = "--debug" in sys.argv
    sys.argv[:] = [word for word in sys.argv if word != "--debug"]
    setup(debug)
    if not debug:
        sys.unraisablehook = _pass_over_late_writers
    try:
        app()
    except (UserError, OSError) as error:
        if debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _pass_over_late_writers(failure: Any) -> None:
    """Prints what cannot be raised, but not of a checkpoint's writer whose save was reported.

    When a disk is full, the store's other writers fail too, after the event loop they would tell.
    """
    if str(failure.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(failure)
