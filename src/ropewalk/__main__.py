"""`python -m ropewalk`, and the `ropewalk` command."""

import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_COMPUTING = ("train", "generate", "chat", "serve")


def main() -> None:
    """Runs the command line; computing commands in a process whose large arrays lie in huge pages.

    On a CPU a train step is a tenth faster so: touching fresh arrays is a large part of it, and the
    kernel hands them out by pages. The C library reads this setting only at its start; hence the
    restart, which costs 20 ms and is left out where the variable is set to anything.
    """
    if sys.platform == "linux" and _TUNABLES not in os.environ and set(sys.argv) & set(_COMPUTING):
        os.environ[_TUNABLES] = _HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from ropewalk.cli import main as command_line  # start-up time: not before the restart

    command_line()


if __name__ == "__main__":
    main()
