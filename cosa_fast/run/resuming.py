"""Which checkpoint a run starts from, and whether it fits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from cosa_fast.config.parsing import config_from_dict, config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.engine.base import EngineBase
from cosa_fast.errors import UserError, first_line
from cosa_fast.evaluation.networks import load, require_whole
from cosa_fast.run.folder import RunFolder


def state_to_resume(config: Config, folder: RunFolder, resume: str | None, say: bool) -> dict[str, Any] | None:
    """The checkpoint that `resume` means: a file, or "auto", the run's newest one that is whole (None if it has none);
    None to start anew.

    With `say`, what was passed over and settings that differ from the checkpoint's are printed. UserError if the file
    cannot be read, or none of the run's is whole.
    """
    found = _newest_whole(folder, say) if resume == "auto" else (Path(resume), _read(Path(resume))) if resume else None
    if found is None:
        return None
    path, state = found
    if say:
        _compare(config, state, path)
    return state


def _newest_whole(folder: RunFolder, say: bool) -> tuple[Path, dict[str, Any]] | None:
    """By iteration; where no numbered checkpoint is whole, last_good.pt or best.pt."""
    named = [path for path in (folder.last_good, folder.best) if path.is_file()]
    problems: list[str] = []
    for path in (*reversed(folder.numbered()), *named):
        try:
            state = _read(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if path in named:
            problems.append(f"no other checkpoint of {folder.path} is whole")
        for problem in problems if say else ():
            print(f"{problem}; going on from {path.name}, iteration {state['iteration']}", flush=True)
        return path, state
    if problems:
        raise UserError(f"{folder.path}: no checkpoint is whole; replace the run with --overwrite ({problems[0]})")
    return None


def _read(path: Path) -> dict[str, Any]:
    state = load(path)
    require_whole(state, path)
    for name, kinds in {"optimizer": dict, "best": int | float}.items():
        if not isinstance(state.get(name), kinds):
            raise UserError(f"checkpoint {path}: {name} is missing or of the wrong type; take another checkpoint")
    return state


def restore(engine: EngineBase, state: dict[str, Any], classes: tuple[str, ...], folder: RunFolder) -> None:
    """Bring the engine to a checkpoint's state. UserError if it has other classes or another shape."""
    if tuple(state["classes"]) != classes:
        raise UserError(f"{folder.path}: the checkpoint was trained on other classes than data.root has")
    try:
        engine.load_state_dict(state)
    except Exception as error:  # what came out of a file can be anything
        raise UserError(
            f"{folder.path}: the checkpoint does not fit this configuration ({first_line(error)})"
        ) from error


def _compare(config: Config, state: dict[str, Any], path: Path) -> None:
    """Say which settings differ from the checkpoint's: the run goes on with the new ones, but not bit for bit."""
    saved = config_from_dict(state["config"], where=str(path))
    same_run = replace(saved, run=config.run, eval=config.eval)
    if config == same_run:
        return
    old, new = config_to_dict(same_run), config_to_dict(config)
    changed = [f"{s}.{k}: {old[s][k]} -> {new[s][k]}" for s in new for k in new[s] if old[s][k] != new[s][k]]
    print(f"resuming {path} with other settings ({'; '.join(changed)})", flush=True)
