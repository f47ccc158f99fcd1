"""The command line, run in this process."""

import contextlib
import io
import sys
from typing import NamedTuple

from ropewalk import cli
from ropewalk.core.log import log


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


def ropewalk(*arguments: str, stdin: str = "") -> Outcome:
    """`ropewalk ARGUMENTS`, exactly as the console script runs it."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin, log.handlers[:], log.level, log.propagate
    sys.argv, sys.stdin = ["ropewalk", *arguments], io.StringIO(stdin)
    code = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as left:
        code = left.code
    finally:
        sys.argv, sys.stdin, log.handlers[:], log.level, log.propagate = before
    return Outcome(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())
