"""What the command lines share: how errors reach the user, and how networks are named."""

import argparse
import os
import sys
from collections.abc import Callable

from cosa_fast.errors import QuietError, UserError

# What --network may say. ON is the student of checkpoints and results.json, AN the teacher.
NETWORKS = {"on": "on", "an": "an", "student": "on", "teacher": "an"}


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
        # The reader of our output (head, less) has gone. The interpreter's last flush would fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def add_crf_side(parser: argparse.ArgumentParser) -> None:
    """The option --crf-side."""
    parser.add_argument(
        "--crf-side",
        type=_side,
        metavar="PIXELS",
        help="longer images are shrunk to this for the CRF; 'ours' sums over all pairs of pixels, which a CPU can only "
        "do for small images",
    )


def _side(text: str) -> int:
    if not text.isdecimal() or int(text) < 16:
        raise UserError(f"--crf-side {text}: give a whole number of pixels from 16 up")
    return int(text)
