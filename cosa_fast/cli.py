"""What the command lines share: how errors reach the user, what signals do, and how networks are named."""

import argparse
import atexit
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from cosa_fast.errors import QuietError, UserError, first_line
from cosa_fast.run.signals import STOPPING, ended_at_once

# What --network may say. ON is the student of checkpoints and results.json, AN the teacher.
NETWORKS = {"on": "on", "an": "an", "student": "on", "teacher": "an"}


def run_cli(main: Callable[[list[str]], int]) -> int:
    """Run `main(argv)`; a UserError becomes one line on stderr and exit status 2 (`--debug` shows the traceback
    instead). So does what the machine refuses: a full disk, a place that cannot be written. SIGTERM and Ctrl-C end the
    process as run/signals.py says."""
    argv = sys.argv[1:]
    debug = "--debug" in argv
    # Nobody is interested in what the interpreter was tidying up when a signal came.
    for number in STOPPING:
        atexit.register(signal.signal, number, signal.SIG_IGN)
    try:
        with ended_at_once():
            status = main([argument for argument in argv if argument != "--debug"])
            sys.stdout.flush()
            return status
    except UserError as error:
        if debug:
            raise
        if not isinstance(error, QuietError):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (head, less) has gone. The interpreter's last flush would fail, too.
        _discard_output()
        return 1
    except KeyboardInterrupt:
        print("stopped by a signal", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        if debug:
            raise
        print(f"error: {first_line(error)}; give more room or another place", file=sys.stderr)
        _discard_output()
        return 2


def _in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Also for Ctrl-C while a door is still importing what it needs."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by a signal", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _unless_by_a_signal(unraisable: "sys.UnraisableHookArgs") -> None:
    """What `Stopped` met in a destructor needs no answer: the run knows of its signal."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


sys.excepthook = _in_one_line
sys.unraisablehook = _unless_by_a_signal


def _discard_output() -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
