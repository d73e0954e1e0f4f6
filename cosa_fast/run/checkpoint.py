"""Checkpoints: written aside and renamed, read with weights_only, rotated; and the networks that one holds."""

import re
from pathlib import Path
from typing import Any

import torch

from cosa_fast.evaluation.networks import FORMAT
from cosa_fast.files import written_aside


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is at every moment absent, the old file, or the whole new one.

    Raises UserError when it cannot be written (a full disk, a read-only folder).
    """
    remedy = "free or choose another disk (run.output) and go on with --resume auto"
    with written_aside(path, remedy, kind="checkpoint") as aside, aside.open("wb") as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            # torch's writer hides why the file could not be written.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


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
