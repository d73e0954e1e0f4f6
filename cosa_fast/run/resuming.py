"""Which checkpoint a run starts from, whether it fits, and what has changed since."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cosa_fast.config.parsing import config_from_dict, config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.engine.base import TrainingEngine
from cosa_fast.errors import UserError, one_line
from cosa_fast.evaluation.networks import load, require_whole
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.replacing import require_no_run

# Of the section "run": what the figures depend on.
DECISIVE = ("seed", "engine", "precision")
# Sections on which the shapes of a state depend.
SHAPING = ("model.", "threshold.")


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run goes on from; `left`: numbered ones of its folder that are newer, or damaged."""

    path: Path
    state: dict[str, Any]
    left: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.path.name}, iteration {self.iteration}"

    @property
    def iteration(self) -> int:
        """Of the checkpoint."""
        return self.state["iteration"]

    @property
    def evaluated(self) -> int:
        """The iteration of the last evaluation before it; its own in files that do not say, which came after it."""
        return self.state.get("evaluated", self.iteration)

    def is_of(self, folder: RunFolder) -> bool:
        """Whether the run in this folder goes on, and not another one begins where this one was."""
        return self.path.resolve().parent == folder.checkpoints.resolve()

    def leave_newer(self) -> None:
        """Rename `left`, so that no later --resume auto takes them for the newest of this run."""
        for path in self.left:
            path.replace(path.with_name(f"{path.name}.left"))


def find_start(folder: RunFolder, resume: str | None, overwrite: bool) -> tuple[Start | None, list[str]]:
    """What `resume` means: "auto" (the run's newest whole checkpoint, if it has any) or a file; None to start anew. And
    what to say about it.

    UserError if the file cannot be read, if no checkpoint of the run is whole, or if the run that goes on would be
    replaced.
    """
    if resume == "auto" and overwrite:
        raise UserError(
            "--resume auto with --overwrite: one goes on with the run, the other replaces it; leave one out"
        )
    if resume == "auto":
        return _newest(folder)
    if resume is None:
        return None, []
    path = Path(resume)
    start = Start(path, _read(path))
    if not start.is_of(folder):
        return start, []
    if overwrite:
        raise UserError(
            f"--resume {path} with --overwrite: it is of the very run that would be replaced; leave one out"
        )
    newer = tuple(other for other in folder.numbered() if int(other.stem) > start.iteration)
    notes = [f"{other}: newer than {path.name}; renamed to {other.name}.left" for other in newer]
    return replace(start, left=newer), notes


def require_room(folder: RunFolder, start: Start | None, resume: str | None) -> None:
    """UserError if another run than that which goes on would be lost."""
    if start is not None and start.is_of(folder):
        return
    if resume != "auto" or folder.kept():
        require_no_run(folder)


def _newest(folder: RunFolder) -> tuple[Start | None, list[str]]:
    damaged: list[Path] = []
    problems: list[str] = []

    def readable(paths: list[Path]) -> Iterator[Start]:
        for path in paths:
            try:
                yield Start(path, _read(path))
            except UserError as error:
                damaged.append(path)
                problems.append(str(error))

    start = next(readable(folder.numbered()[::-1]), None)
    if start is None:  # of a run that was cleared out by hand, these may be all that is left
        others = [path for path in (folder.best, folder.last_good) if path.exists()]
        start = max(readable(others), key=lambda found: found.iteration, default=None)
    if start is None and problems:
        raise UserError(f"{folder.path}: no checkpoint is whole; replace the run with --overwrite ({problems[0]})")
    if start is None:
        return None, [f"{folder.path}: no checkpoint to resume, the run begins"]
    left = tuple(path for path in damaged if path.stem.isdecimal())
    if not start.path.stem.isdecimal():
        problems.append(f"no other checkpoint of {folder.path} is whole")
    return replace(start, left=left), [f"{problem}; going on from {start}" for problem in problems]


def _read(path: Path) -> dict[str, Any]:
    state = load(path)
    require_whole(state, path)
    for name, kinds in {"optimizer": dict, "best": int | float}.items():
        if not isinstance(state.get(name), kinds):
            raise UserError(f"checkpoint {path}: {name} is missing or of the wrong type; take another checkpoint")
    return state


def restore(engine: TrainingEngine, start: Start, classes: tuple[str, ...]) -> None:
    """Bring the engine to a checkpoint's state. UserError if it has other classes or another shape."""
    if tuple(start.state["classes"]) != classes:
        raise UserError(
            f"{start.path}: the checkpoint was trained on other classes than data.root has; set data.classes"
        )
    try:
        engine.load_state_dict(start.state)
    except Exception as error:  # what came out of the file can be anything
        shapes = [change for change in _changed_settings(engine.config, start) if change.startswith(SHAPING)]
        reason = "; ".join(shapes) or one_line(error, 200)
        raise UserError(
            f"{start.path}: the checkpoint does not fit this configuration ({reason}); resume with that of its run"
        ) from error


def changes(config: Config, fingerprints: dict[str, str], start: Start) -> str:
    """What differs from the checkpoint's run, on one line: settings, seed, data; empty where nothing does. The run goes
    on with the new ones, but not bit for bit."""
    found = _changed_settings(config, start)
    before = start.state.get("data")
    if isinstance(before, dict):
        found += [f"{name} have changed" for name, now in fingerprints.items() if before.get(name, now) != now]
    return f"resuming {start.path} with other settings ({'; '.join(found)})" if found else ""


def _changed_settings(config: Config, start: Start) -> list[str]:
    saved = config_from_dict(start.state["config"], where=str(start.path))
    old, new = config_to_dict(saved), config_to_dict(config)
    keys = [(s, k) for s in new for k in new[s] if s not in ("run", "eval", "log") or (s == "run" and k in DECISIVE)]
    return [f"{s}.{k}: {_cut(old[s][k])} -> {_cut(new[s][k])}" for s, k in keys if old[s][k] != new[s][k]]


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
