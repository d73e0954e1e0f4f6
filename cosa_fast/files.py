"""Reading and writing small files, with errors a user understands."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cosa_fast.errors import UserError


def read_text(path: Path) -> str:
    """The file as UTF-8 text. UserError naming the file if it is missing, unreadable or not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def read_lines(path: Path) -> list[str]:
    """The file's lines without surrounding blanks, empty ones left out."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_json(path: Path) -> Any:
    """The parsed JSON file. UserError naming file and position if it is no JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); mend the file") from None


def write_text_atomically(path: Path, text: str) -> None:
    """Write the file as a whole. UserError as in `written_aside`."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """The place beside `path` to write to, renamed when the block is done: a reader sees the old file or the whole new
    one. UserError if the place cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
