"""Networks back from a checkpoint's file."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosa_fast.config.parsing import config_from_dict
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError, first_line
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet

FORMAT = 1
# Checkpoints, results.json and log.jsonl call ON student and AN teacher.
NAMES_IN_FILES = {"on": "student", "an": "teacher"}
# What evaluation and prediction need of a checkpoint.
PARTS = {"iteration": int, "config": dict, "classes": list, "student": dict, "teacher": dict, "thresholds": list}


@dataclass(frozen=True)
class Networks:
    """What evaluation and prediction need of a checkpoint. `thresholds`: (ξ, ξ†), each None where the run had none yet,
    or has none at all."""

    config: Config
    classes: tuple[str, ...]
    iteration: int
    on: CoSANet
    an: CoSANet
    thresholds: tuple[float | None, float | None]

    def named(self, name: str) -> CoSANet:
        """The network "on" or "an"."""
        return {"on": self.on, "an": self.an}[name]


def load(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The dictionary in a checkpoint, as run/checkpoint.py saved it, after its checksums were found right. Raises
    UserError when the file is missing, damaged, or something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; checkpoints are in runs/NAME/checkpoints/")
    if not zipfile.is_zipfile(path):
        raise UserError(f"checkpoint {path}: cut short, or not a checkpoint; take another one of the run")
    try:
        _verify(path)
        state = torch.load(path, map_location=device, weights_only=True)
    # What a damaged pickle raises depends on its bytes: KeyError, IndexError, struct.error ...
    except Exception as error:
        raise UserError(f"checkpoint {path}: cannot be read as a checkpoint ({first_line(error, 120)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"checkpoint {path}: not a cosa_fast checkpoint; weights go in by model.weights={path}")
    config = state.get("config")
    loss = config.get("loss") if isinstance(config, dict) else None
    if isinstance(loss, dict):
        loss.setdefault("csc_vectors", "logits")  # before there was a choice, csc compared logits
    return state


def require_whole(state: dict[str, Any], path: str | Path) -> None:
    """UserError naming the file unless a loaded checkpoint has every part, each of its type, and finite weights.
    Shapes are checked where the weights are used."""
    for name, kind in PARTS.items():
        if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
            found = type(state[name]).__name__ if name in state else "missing"
            raise UserError(f"checkpoint {path}: {name} is {found}, not {kind.__name__}; take another checkpoint")
    if state["iteration"] < 0 or not all(isinstance(name, str) for name in state["classes"]):
        raise UserError(f"checkpoint {path}: iteration or classes make no sense; take another checkpoint")
    for part in NAMES_IN_FILES.values():
        for name, tensor in state[part].items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise UserError(f"checkpoint {path}: {part} holds something else than weights; take another checkpoint")
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise UserError(f"checkpoint {path}: {part}.{name} is not finite; take an earlier checkpoint")


def _verify(path: Path) -> None:
    """Compare every part of the archive with its CRC-32, which torch writes and does not read."""
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("compressed, which no checkpoint is")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"damaged: wrong checksum of {damaged}")


def load_networks(path: str | Path, device: str | torch.device = "cpu") -> Networks:
    """Both networks of a checkpoint in eval mode, with their configuration; raises UserError as `load` does, and as
    `require_whole` does."""
    state = load(path, device)
    require_whole(state, path)
    config = config_from_dict(state["config"], ["model.weights=none"], where=str(path))
    classes, iteration = tuple(state["classes"]), state["iteration"]

    def network(name: str) -> CoSANet:
        built = build_model(config.model, len(classes))
        built.load_state_dict(state[NAMES_IN_FILES[name]])
        return built.to(device).eval().requires_grad_(False)

    try:
        thresholds = _thresholds(config, iteration, state)
        return Networks(config, classes, iteration, network("on"), network("an"), thresholds)
    except UserError:
        raise
    except Exception as error:  # what came out of the file can be anything
        raise UserError(
            f"checkpoint {path}: does not fit its own configuration ({first_line(error)}); take another checkpoint"
        ) from error


def has_thresholds(config: Config, iteration: int) -> bool:
    """Whether a run has single thresholds ξ and ξ† after so many iterations: not before co-training, nor with bands."""
    return iteration > config.optim.cotrain_after and config.threshold.mode != "band"


def _thresholds(config: Config, iteration: int, state: dict[str, Any]) -> tuple[float | None, float | None]:
    if not has_thresholds(config, iteration):
        return None, None
    if config.threshold.mode == "fixed":
        return config.threshold.value, config.threshold.value_aux
    xi, xi_aux = (float(item["value"]) for item in state["thresholds"])
    return xi, xi_aux
