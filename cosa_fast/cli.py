"""What the command lines share: how errors reach the user, and how networks are named."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from cosa_fast.errors import QuietError, UserError, first_line

# What --network may say. ON is the student of checkpoints and results.json, AN the teacher.
NETWORKS = {"on": "on", "an": "an", "student": "on", "teacher": "an"}


def run_cli(main: Callable[[list[str]], int], stopped: int = 130) -> int:
    """Run `main(argv)`; a UserError becomes one line on stderr and exit status 2 (`--debug` shows the traceback
    instead). So does what the machine refuses: a full disk, a place that cannot be written. SIGTERM and Ctrl-C end it
    with one line and the status `stopped`."""
    argv = sys.argv[1:]
    debug = "--debug" in argv
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _interrupt) if in_main else None
    try:
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
        return stopped
    except OSError as error:
        if debug:
            raise
        print(f"error: {first_line(error)}; give more room or another place", file=sys.stderr)
        _discard_output()
        return 2
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _discard_output() -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
