"""Checkpoints: written aside and renamed, read with weights_only, rotated; and the networks that one holds."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import FORMAT


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is at every moment absent, the old file, or the whole new one.

    Raises UserError when it cannot be written (a full disk, a read-only folder).
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise UserError(
            f"checkpoint {path}: cannot be written ({error.strerror or error}); free or choose another disk "
            "(run.output) and go on with --resume auto"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def latest(directory: Path) -> Path | None:
    """The checkpoint of the highest iteration in a run's checkpoint folder."""
    numbered = _numbered(directory)
    return numbered[-1] if numbered else None


def rotate(directory: Path, keep: int) -> None:
    """Delete all but the last `keep` numbered checkpoints; best.pt and others stay."""
    for path in _numbered(directory)[:-keep]:
        path.unlink()


def numbered_path(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is kept."""
    return directory / f"{iteration:08d}.pt"


def _numbered(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.pt") if re.fullmatch(r"\d+\.pt", path.name))
