"""Every path below runs/NAME, and the lock of the one process that writes there."""

import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError
from cosa_fast.files import unfinished

try:
    import fcntl
except ImportError:  # Windows
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

# Seconds between two touches of a lock, and without any after which another host's owner is taken for dead.
HEARTBEAT, SILENCE = 10.0, 60.0


class RunFolder:
    """The folder of one run. Nothing is made or read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.manifest = path / "manifest.json"
        self.log = path / "log.jsonl"
        self.tensorboard = path / "tensorboard"
        self.held_out = path / "held_out.txt"  # without data.val_split: images evaluated and not trained on
        self.results = path / "results.json"  # the last evaluation, and pictures of it
        self.per_class = path / "results.csv"
        self.gallery = path / "gallery.png"
        self.observed = path / "observed"  # what a report draws of the evaluations (run/observations.py)
        self.pictures = self.observed / "pictures.json"
        self.report = path / "report.html"
        self.trace = path / "profile" / "trace.json"  # for chrome://tracing or ui.perfetto.dev
        self.top = path / "profile" / "top.txt"  # what took the most time of its own
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / "best.pt"
        self.last_good = self.checkpoints / "last_good.pt"  # the state before a loss that was not finite

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """run.output/run.name."""
        return cls(Path(config.run.output).expanduser() / config.run.name)

    def checkpoint(self, iteration: int) -> Path:
        """The checkpoint after so many iterations."""
        return self.checkpoints / f"{iteration:08d}.pt"

    def observation(self, iteration: int) -> Path:
        """What the evaluation after so many iterations has left for a report."""
        return self.observed / f"{iteration:08d}.json"

    def numbered(self) -> list[Path]:
        """The checkpoints by iteration that are there, the newest last."""
        return sorted(path for path in self.checkpoints.glob("*.pt") if re.fullmatch(r"\d+\.pt", path.name))

    def kept(self) -> list[Path]:
        """What a run has left that is worth keeping: its checkpoints and results; best.pt may be all that there is."""
        return [*sorted(self.checkpoints.glob("*.pt")), *([self.results] if self.results.exists() else [])]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """To run in: this process alone writes here. UserError where another one does, or nobody can.

        The folder is made for it, and taken away again if nothing was written to it.
        """
        if not HAS_LOCKS:
            raise UserError("training needs a POSIX system's file locks; on Windows use WSL 2 (docs/platforms.md)")
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = _Lock(self.path / ".lock")
        except OSError as error:
            raise UserError(
                f"run folder {self.path}: cannot be written ({error.strerror or error}); set run.output or run.name"
            ) from error
        try:
            yield
        finally:
            lock.release()
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()


class _Lock:
    """A file with host and process of whoever writes in a folder, who touches it every HEARTBEAT seconds.

    The kernel frees it with its process, however that ends; children do not inherit it. On a disk that several hosts
    share, one may not see another's lock: there the file itself counts, until it has not been touched for SILENCE.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._released = threading.Event()
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            owner = _owner(self._descriptor)
            if not self._is_free(owner):
                os.close(self._descriptor)
                raise UserError(
                    f"{path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', 'this host')}; "
                    "end it first or give this run another run.name"
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), path.stat()):
                    break
            os.close(self._descriptor)  # its owner removed it in this very moment
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        unfinished.add(path)
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    def release(self) -> None:
        self._released.set()
        self._beating.join(1)  # not for ever: its disk may hang
        unfinished.discard(self._path)
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _is_free(self, owner: dict[str, object]) -> bool:
        elsewhere = owner.get("host", socket.gethostname()) != socket.gethostname()
        if elsewhere and not self._is_silent(owner):
            return False
        # Only now: the kernel takes a process's lock away when it closes the file, through whatever descriptor.
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network disks have no locks; there the process is looked for.
            if error.errno in (errno.EACCES, errno.EAGAIN) or (not elsewhere and _runs(owner.get("pid"))):
                return False
        return True

    def _is_silent(self, owner: dict[str, object]) -> bool:
        print(
            f"{self._path}: waiting {SILENCE:.0f} s to see whether process {owner.get('pid')} on {owner.get('host')} "
            "still works here",
            flush=True,
        )
        touched = _touched(self._path)
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(HEARTBEAT / 4)
            if _touched(self._path) != touched:
                return False
        return True

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self._path)


def _touched(path: Path) -> int | None:
    """When, by the disk's own clock; None where the file is gone. It is opened, for a network disk to look anew."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> dict[str, object]:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _runs(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:
        return True  # another user's
    return True
