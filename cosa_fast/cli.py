"""What every command line shares: how errors reach the user."""

import os
import sys
from collections.abc import Callable

from cosa_fast.errors import QuietError, UserError


def run_cli(main: Callable[[list[str]], int]) -> int:
    """Run `main(argv)`; a UserError becomes one line on stderr and exit status 2 (`--debug` shows the traceback
    instead)."""
    argv = sys.argv[1:]
    debug = "--debug" in argv
    try:
        return main([argument for argument in argv if argument != "--debug"])
    except UserError as error:
        if debug:
            raise
        if not isinstance(error, QuietError):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; point stdout elsewhere so that the interpreter's last flush
        # stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
