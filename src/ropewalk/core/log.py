"""One logger for the project; everything a person reads goes to stderr, results go to stdout."""

import logging
import sys

log = logging.getLogger("ropewalk")


def setup(verbose: bool = False) -> None:
    """Sends the project's log to stderr, one plain line a message; called once by the command
    line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False
