"""A run in the place of an earlier one, which stays until it has a checkpoint; what killed processes have left."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosa_fast.errors import UserError
from cosa_fast.run.folder import RunFolder


def require_no_run(folder: RunFolder) -> None:
    """UserError if an earlier run left something worth keeping, or is being replaced by one that has not got far."""
    kept = [*folder.kept(), *RunFolder(_replaced(folder)).kept()]
    if kept:
        goes_on = any(path.suffix == ".pt" for path in kept)
        raise UserError(
            f"{folder.path} holds a run already ({kept[0].relative_to(folder.path)}); "
            f"{'continue it with --resume auto' if goes_on else 'it has no checkpoint to go on from'}, "
            "replace it with --overwrite, or give this one another run.name"
        )


def tidy(folder: RunFolder) -> None:
    """Remove what killed processes have left: half-written files, half of a replacement."""
    for place in (folder.path, folder.checkpoints, folder.observed):
        for path in place.glob(".*.partial"):
            path.unlink(missing_ok=True)
    _remove(_discarded(folder))
    if _moving(folder).exists():
        _move_back(folder)
    if folder.kept():
        drop_replaced(folder)


@contextmanager
def replacing(folder: RunFolder) -> Iterator[None]:
    """To begin a run in: an earlier one of the folder is set aside, so that two runs never mix. It comes back if this
    one fails before it has a checkpoint; after a signal or a kill it stays aside, for then this one can go on."""
    _set_aside(folder)
    try:
        yield
    except Exception:
        if _replaced(folder).exists() and not folder.kept():
            for path in _entries(folder, folder.path):
                _remove(path)
            _replaced(folder).rename(_moving(folder))
            _move_back(folder)
        raise


def drop_replaced(folder: RunFolder) -> None:
    """Remove the earlier run for good."""
    if _replaced(folder).exists():
        _replaced(folder).rename(_discarded(folder))
        _remove(_discarded(folder))


def _set_aside(folder: RunFolder) -> None:
    if not folder.kept():  # what there is has come to nothing, and an earlier run may be aside already
        for path in _entries(folder, folder.path):
            _remove(path)
        return
    _moving(folder).mkdir(exist_ok=True)
    for path in _entries(folder, folder.path):
        path.rename(_moving(folder) / path.name)
    _moving(folder).rename(_replaced(folder))


def _move_back(folder: RunFolder) -> None:
    for path in _entries(folder, _moving(folder)):
        path.rename(folder.path / path.name)
    _moving(folder).rmdir()


def _replaced(folder: RunFolder) -> Path:
    return folder.path / ".replaced"


def _moving(folder: RunFolder) -> Path:
    """On its way to be `_replaced`, or back: some of a run, the rest of which is in its old place."""
    return folder.path / ".moving"


def _discarded(folder: RunFolder) -> Path:
    return folder.path / ".discarded"


def _entries(folder: RunFolder, place: Path) -> list[Path]:
    """What a run writes, as far as it is in `place`."""
    files = (folder.config, folder.log, folder.manifest, folder.held_out, folder.results, folder.gallery)
    reports = (folder.per_class, folder.report, folder.observed, folder.path / "wandb")
    names = [path.name for path in (*files, *reports, folder.tensorboard, folder.trace.parent, folder.checkpoints)]
    return [place / name for name in names if (place / name).exists()]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
