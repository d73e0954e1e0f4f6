"""Every path below runs/NAME, and the lock of the one process that writes there."""

import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError
from cosa_fast.files import unfinished


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
    """A file with host and process of whoever writes in a folder.

    The kernel frees it with its process, however that ends; children do not inherit it. On a disk that several hosts
    share, one may not see the other's lock: there the file itself counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        host = socket.gethostname()
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except OSError as error:
                # Some network disks have no locks; there the process is looked for.
                free = error.errno not in (errno.EACCES, errno.EAGAIN) and not _runs(_owner(descriptor).get("pid"))
            owner = _owner(descriptor)
            if not free or owner.get("host", host) != host:
                os.close(descriptor)
                raise UserError(
                    f"{path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', 'this host')}; "
                    f"end it first or give this run another run.name; if it no longer runs, delete {path}"
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            os.close(descriptor)  # its owner removed it in this very moment
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": host, "pid": os.getpid()}).encode(), 0)
        unfinished.add(path)

    def release(self) -> None:
        unfinished.discard(self._path)
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


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
