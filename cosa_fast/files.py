"""Reading and writing small files, with errors a user understands."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from cosa_fast.errors import UserError, hint

# Of a folder, so many names are looked at for one like that which was given.
_NEIGHBOURS = 2000
# What nobody has a use for if this process ends at once.
unfinished: set[Path] = set()


def read_text(path: Path) -> str:
    """The file as UTF-8 text. UserError naming the file if it is missing, unreadable or not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{nearest(path)}; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{path}: {error}; check the path") from None


def nearest(path: Path) -> str:
    """ " (did you mean 'runs/voc'?)" for a path that is not there: the first missing part of it, against the names that
    are in its place; or nothing."""
    with suppress(OSError, ValueError):
        while not path.parent.exists():
            path = path.parent
        above = "" if path.parent == Path() else f"{path.parent}/".replace("//", "/")
        with os.scandir(path.parent) as entries:
            return hint(path.name, [entry.name for entry in islice(entries, _NEIGHBOURS)], above)
    return ""


def read_lines(path: Path) -> list[str]:
    """The file's lines without surrounding blanks, empty ones left out."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_json(path: Path) -> Any:
    """The parsed JSON file. UserError naming file and position if it is no JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        raise UserError(f"{path}: not valid JSON ({error}); mend the file") from None


def require_place(path: Path, option: str, *, folder: bool = False) -> None:
    """To be asked before long work: UserError, which begins with `option`, unless a file can be written at `path`, or
    files into the folder `path`. Nothing is made, and the folders above need not be there."""
    reason = ""
    try:
        there = next(place for place in (path, *path.parents)[not folder :] if place.exists())
        if not there.is_dir():
            reason = f"{there} is a file"
        elif path.is_dir() and not folder:
            reason = "it is a folder"
        elif not os.access(there, os.W_OK | os.X_OK):
            reason = f"no permission to write into {there}"
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"{option} {path}: cannot be written ({reason}); give another {'folder' if folder else 'file'}")


def write_text(path: Path, text: str) -> None:
    """Write the file as a whole. UserError as in `written_aside`."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON, on one line if `indent` is None, with null for numbers that JSON has not (NaN,
    infinities). UserError as in `written_aside`."""
    write_text(path, json.dumps(_without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def written_aside(path: Path, remedy: str = "choose another place", kind: str = "") -> Iterator[Path]:
    """A place beside `path` to write to. When the block is done, its content is brought to the disk and takes the name
    `path`: a reader, and whoever comes after a loss of power, finds the old file or the whole new one.

    Raises UserError, which names `kind` and path and ends with `remedy`, where it cannot be written (a full disk, a
    read-only folder); `path` is then as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.add(aside)
        yield aside
        _sync(aside)
        aside.replace(path)
        with suppress(OSError):  # some network disks do not sync folders
            _sync(path.parent)
    except OSError as error:
        name = f"{kind} {path}".strip()
        raise UserError(f"{name}: cannot be written ({_refusal(path, error)}); {remedy}") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        unfinished.discard(aside)


def _refusal(path: Path, error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{path.parent} is no folder"
    return "it is a folder" if isinstance(error, IsADirectoryError) else str(error.strerror or error)


def remove_unfinished() -> None:
    """Remove the files in `unfinished`."""
    for path in [*unfinished]:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    # Windows syncs only what may be written; no system opens a folder for writing.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
