"""Which checkpoint a run starts from, and whether it fits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from cosa_fast.config.parsing import config_from_dict, config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.engine.base import EngineBase
from cosa_fast.errors import UserError, first_line
from cosa_fast.evaluation.networks import load
from cosa_fast.run import checkpoint
from cosa_fast.run.folder import RunFolder


def state_to_resume(config: Config, folder: RunFolder, resume: str | None, say: bool) -> dict[str, Any] | None:
    """The checkpoint that `resume` means: "auto" (the run's newest, if there is one) or a file; None to start anew.

    With `say`, settings that differ from the checkpoint's are printed. UserError if the file cannot be read.
    """
    path = checkpoint.latest(folder) if resume == "auto" else Path(resume) if resume else None
    if path is None:
        return None
    state = load(path)
    if say:
        _compare(config, state, path)
    return state


def restore(engine: EngineBase, state: dict[str, Any], classes: tuple[str, ...], folder: RunFolder) -> None:
    """Bring the engine to a checkpoint's state. UserError if it has other classes or another shape."""
    if tuple(state["classes"]) != classes:
        raise UserError(f"{folder.path}: the checkpoint was trained on other classes than data.root has")
    try:
        engine.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
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
