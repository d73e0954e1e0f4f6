"""What every fuzzed input is held to: a result, or one UserError of one short line that names the file or key; in time;
and nothing is written outside the folder that was given, started, connected to, or unpickled.

`make test` runs a few inputs of each kind, the same every time. COSA_FAST_DEEP=1 runs COSA_FAST_DEEP_EXAMPLES (2000) of
each, other ones every time.
"""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cosa_fast.errors import LONGEST_MESSAGE, UserError

SECONDS = 10
DEEP = os.environ.get("COSA_FAST_DEEP", "") not in ("", "0")
DEEP_EXAMPLES = int(os.environ.get("COSA_FAST_DEEP_EXAMPLES", "2000"))

# Of both outcomes, over the whole session.
counts: Counter[str] = Counter()

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_NEVER = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"),
    *("socket.connect", "socket.bind", "pickle.find_class", "urllib.Request"),
}


class TooLongError(BaseException):
    """Not an Exception: code that catches whatever a decoder raises must not catch this."""


class _Watch:
    """The folder in which things may be written while an input is tried, and what was done beyond it."""

    folder: Path | None = None
    trespasses: tuple[str, ...] = ()

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _NEVER:
            self.trespasses += (f"{event} {arguments!r:.200}",)
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            self._require_inside(event, arguments[:1])
        elif event in _CHANGES:
            self._require_inside(event, arguments[:2])

    def _require_inside(self, event: str, paths: tuple[Any, ...]) -> None:
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                place = os.path.abspath(os.fsdecode(path))
                # What an import writes is no deed of the input.
                if "__pycache__" not in place and not f"{place}{os.sep}".startswith(f"{self.folder}{os.sep}"):
                    self.trespasses += (f"{event} {place}",)


_watch = _Watch()
sys.addaudithook(_watch.hook)


def fuzzed(examples: int) -> settings:
    """So many inputs in the gate, the same every time; many more, and new ones, in the deep form."""
    return settings(
        max_examples=DEEP_EXAMPLES if DEEP else examples,
        derandomize=not DEEP,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def held(folder: Path, call: Callable[[], Any], *names: str) -> Any:
    """What `call` gives; None where it refuses its input with a proper UserError, which names one of `names` if there
    are any."""
    _watch.folder, _watch.trespasses = folder.absolute(), ()
    try:
        with _in_time():
            result = call()
        counts["results"] += 1
        return result
    except UserError as error:
        message = str(error)
        assert message.isprintable()
        assert message.strip()
        assert len(message) <= LONGEST_MESSAGE
        assert not names or any(name in message for name in names), message
        counts["refusals"] += 1
        return None
    finally:
        _watch.folder = None
        assert not _watch.trespasses, _watch.trespasses


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooLongError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1e9, -1e9, 1e308, float("nan"), float("inf"), -0.0, 2**31, 2**63, 2**64, 10**400, 0.5]),
    st.integers(-20, 20),
    st.floats(),
    st.integers(),
)
TEXTS = st.one_of(
    st.sampled_from(["", " ", "a", "cat", "..", "../../x", "/etc/passwd", "a\0b", "~nobody", "\udcff", "x" * 5000]),
    st.sampled_from(["\x1b[2J", "\n\n", "0100", "08", "1:30", "1e5", "null", "=", "<<", "é" * 300, "2001-99-99"]),
    st.text(max_size=20),
)
# Whatever JSON and YAML can hold.
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A valid file with a few of its bytes changed, taken out, put in, or its end cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        # The interesting bytes are at the head and at the tail.
        near = draw(st.sampled_from([min(32, len(content)), min(600, len(content)), len(content)]))
        at = draw(st.integers(0, near))
        at = len(content) - at if draw(st.booleans()) and near < len(content) else at
        some = draw(st.one_of(st.binary(max_size=6), st.sampled_from([b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff"])))
        kind = draw(st.sampled_from(["change", "insert", "remove", "cut", "repeat"]))
        if kind == "cut":
            del content[at:]
        elif kind == "repeat":
            content[at:at] = content[at : at + 64] * draw(st.integers(1, 30))
        else:
            content[at : at + (0 if kind == "insert" else len(some))] = b"" if kind == "remove" else some
    return bytes(content)


def put(holder: Any, draw: st.DrawFn, value: Any) -> None:
    """Put `value` at a random place of nested dictionaries and lists; or take out what is there."""
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        inner = holder[key]
        if isinstance(inner, dict | list) and inner and draw(st.integers(0, 4)):
            holder = inner
        elif draw(st.integers(0, 5)):
            holder[key] = value
            return
        else:
            del holder[key]
            return
