"""The files of checkpoints: saved whole, rotated. evaluation/networks.py reads and verifies them."""

from pathlib import Path
from typing import Any

import torch

from cosa_fast.errors import first_line
from cosa_fast.evaluation.networks import FORMAT
from cosa_fast.files import written_aside
from cosa_fast.run.folder import RunFolder


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is at every moment absent, the old file, or the whole new one. The archive holds a
    CRC-32 of each of its parts.

    Raises UserError when it cannot be written (a full disk, a read-only folder).
    """
    remedy = "free or choose another disk (run.output) and go on with --resume auto"
    with written_aside(path, remedy, kind="checkpoint") as aside, aside.open("wb") as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            # torch's writer hides why the file could not be written.
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(first_line(error)) from error


def latest(folder: RunFolder) -> Path | None:
    """The checkpoint of the highest iteration; None where there is none."""
    numbered = folder.numbered()
    return numbered[-1] if numbered else None


def rotate(folder: RunFolder, keep: int) -> None:
    """Delete all but the last `keep` checkpoints by iteration; best.pt and others stay."""
    for path in folder.numbered()[:-keep]:
        path.unlink(missing_ok=True)
