"""SIGTERM and Ctrl-C: they end a command line at once; training finishes its step first, and saves."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from cosa_fast.files import remove_unfinished

STOPPING = (signal.SIGTERM, signal.SIGINT)
POSIX = os.name == "posix"


def _never() -> bool:
    return False


_can_go_on: Callable[[], bool] = _never
_told = False


@contextmanager
def ended_at_once() -> Iterator[None]:
    """For a command line to run in: a signal ends the process with one line, whatever it is in, also a library's long
    wait. Exit status: 128 + the signal's number, or 0 as `resumable` says.

    Nothing is raised anywhere, and nothing cleaned up but unfinished files: what is on the disk is as whole as after a
    kill. A thread is told of the signals, for Python's own handlers wait until the main thread is back from C. In
    another thread than the main one, which alone can have handlers, this does nothing; nor where pipes cannot be told
    of signals (Windows).
    """
    if not (_in_main_thread() and POSIX):
        yield
        return
    global _told
    _told = False
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    wakeup = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    previous = _handle(_stand_still)
    threading.Thread(target=_leave_when_told, args=(receiving,), daemon=True).start()
    try:
        yield
    finally:
        _restore(previous)
        signal.set_wakeup_fd(wakeup)
        os.close(sending)


@contextmanager
def resumable(can_go_on: Callable[[], bool]) -> Iterator[None]:
    """Inside, a command line that a signal ends says how to go on, and exits with status 0, where `can_go_on()`; but
    not as one of several processes: there a launcher must see the failure, and end the others."""
    global _can_go_on
    before, _can_go_on = _can_go_on, can_go_on
    try:
        yield
    finally:
        _can_go_on = before


def told() -> None:
    """The user knows that a signal ends the run: a further one, which does so at once, gets no line of its own."""
    global _told
    _told = True


class Stopped(KeyboardInterrupt):
    """A signal came while something was waited for."""


class Signals:
    """What signals mean to a run. Within `noted` they set `received`. Outside of it they mean what they meant before:
    whatever a run does outside of its steps can be done again."""

    def __init__(self) -> None:
        self.received = 0
        self._raising = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """To train in: what has begun is finished, and whoever is inside looks at `received`."""
        if not _in_main_thread():
            yield
            return
        self._before = _handle(self._note)
        try:
            yield
        finally:
            _restore(self._before)

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Inside of `noted`, for work that is not to be waited for: signals, also one received before, mean again what
        they meant."""
        if not _in_main_thread():
            yield
            return
        _restore(self._before)
        try:
            self.obey()
            yield
        finally:
            _handle(self._note)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Inside of `noted`, to wait in: a signal raises `Stopped`."""
        self._raising = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self._raising = False

    def obey(self) -> None:
        """Outside of `noted`: do as a signal says that was received in it."""
        if self.received:
            signal.raise_signal(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._raising:
            self._raising = False
            raise Stopped


_Handlers = dict[signal.Signals, "Callable[[int, FrameType | None], object] | int | None"]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _handle(handler: Callable[[int, FrameType | None], object]) -> _Handlers:
    """Returns the handlers of before."""
    return {number: signal.signal(number, handler) for number in STOPPING}


def _restore(handlers: _Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _stand_still(number: int, frame: FrameType | None) -> None:
    """The main thread's part in the end of the process: not to go on."""
    time.sleep(60)


def _leave_when_told(receiving: int) -> None:
    while told := os.read(receiving, 1):
        number = told[0]
        if number in STOPPING and signal.getsignal(number) is _stand_still:
            _leave(number)
    os.close(receiving)


def _leave(number: int) -> None:
    saved = _can_go_on()
    if os.environ.get("RANK", "0") == "0" and not _told:
        line = f"stopped by a signal{'; go on with --resume auto' if saved else ''}\n"
        with suppress(OSError):
            os.write(2, f"\n{line}".encode() if os.isatty(2) else line.encode())
    remove_unfinished()
    for child in multiprocessing.active_children():
        child.kill()
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    os._exit(0 if saved and alone else 128 + number)
