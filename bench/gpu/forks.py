"""A part in a process of its own, forked from one that has imported everything, under a time limit.

Importing torch, Triton and timm takes longer than some parts; a fork has them already. The parent never opens CUDA,
which would not survive a fork. A part that crashes, hangs or runs out of memory ends alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

TIMED_OUT = 124
GRACE = 3.0  # seconds between the request to end and the end


def run(action: Callable[[], int | None], log: Path, limit: float, meanwhile: Callable[[], None]) -> int:
    """The exit status of an action that prints to `log`: its result, 1 after an exception, 124 at its limit in seconds,
    128 + n after signal n. `meanwhile` is called every second or so."""
    child = os.fork()
    if child == 0:
        _become(action, log)
    deadline, asked_to_end, late = time.monotonic() + limit, False, False
    beat = time.monotonic() + 1
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return TIMED_OUT if late else code if code >= 0 else 128 - code
            now = time.monotonic()
            if now > deadline:
                _signal(child, signal.SIGKILL if asked_to_end else signal.SIGTERM)
                deadline, asked_to_end, late = now + GRACE, True, True
            if now > beat:
                meanwhile()
                beat = time.monotonic() + 1
            time.sleep(0.05)
    finally:
        _signal(child, signal.SIGKILL)  # what it started, and itself if this process was interrupted


def value_of(function: Callable[[], Any], place: Path, limit: float) -> Any:
    """What the function returns in a fork (as JSON has it); None where it fails. `place`: a folder to write to."""
    answer = place / "answer.json"

    def action() -> None:
        answer.write_text(json.dumps(function()), encoding="utf-8")

    run(action, place / "answer.log", limit, lambda: None)
    with suppress(OSError, ValueError):
        return json.loads(answer.read_text(encoding="utf-8"))
    return None


def _become(action: Callable[[], int | None], log: Path) -> None:
    """The child: a group of its own, all output to the log, and never a return."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stdout.flush()
        sys.stderr.flush()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source, target)
        # Streams of its own: whatever stood for them in the parent may go elsewhere.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, "utf-8", closefd=False) for number in (1, 2))
        status = action() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # whatever it is, it belongs into the log, and this process ends here
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _signal(child: int, number: int) -> None:
    """To the child and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, number)
