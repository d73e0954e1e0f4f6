"""SIGTERM and Ctrl-C: obeyed at once where nothing can be lost, else at the end of the step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal ended the run where nothing was left to save."""


class Signals:
    """What the signals that ask a run to end mean, from its start to its end.

    They raise `Stopped` at once, for whatever a run does outside of its steps can be done again: start-up, evaluations,
    the last pictures. Within `noted` they only set `received`.
    """

    def __init__(self) -> None:
        self.received = 0
        self._only_noted = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """To run in; afterwards the handlers are those of before. Does nothing outside of the main thread, which alone
        can have handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (*STOPPING, signal.SIGCHLD)
        previous = {number: signal.getsignal(number) for number in handled}
        for number in STOPPING:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """To train in: what has begun is finished, and whoever is inside looks at `received`."""
        self._only_noted = True
        try:
            yield
        finally:
            self._only_noted = False

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Inside of `noted`, for work that is not to be waited for: raises `Stopped` at once again."""
        self._only_noted = False
        try:
            self.obey()
            yield
        finally:
            self._only_noted = True

    def obey(self) -> None:
        """`Stopped` if a signal was noted."""
        if self.received:
            raise Stopped

    def leave_workers_to_their_loader(self) -> None:
        """Torch answers the death of a loader's worker with an error from a signal handler: anywhere, in the middle of
        a step or of a checkpoint too. The loader finds it out by itself, at the next batch."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if not self._only_noted:
            raise Stopped
