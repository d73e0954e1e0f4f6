"""Networks back from a checkpoint's file."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cosa_fast.config.parsing import config_from_dict
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError, first_line
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet

FORMAT = 1


@dataclass(frozen=True)
class Networks:
    """What evaluation and prediction need of a checkpoint. `thresholds`: (ξ, ξ†), None before co-training or without
    one."""

    config: Config
    classes: tuple[str, ...]
    iteration: int
    student: CoSANet
    teacher: CoSANet
    thresholds: tuple[float | None, float | None]


def load(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The dictionary that `save` wrote. Raises UserError when the file is missing, cut short, or something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; checkpoints are in runs/NAME/checkpoints/")
    if not zipfile.is_zipfile(path):
        raise UserError(f"checkpoint {path}: cut short, or not a checkpoint; take another one of the run")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    # What a damaged pickle raises depends on its bytes: KeyError, IndexError, struct.error ...
    except Exception as error:
        raise UserError(f"checkpoint {path}: cannot be read as a checkpoint ({first_line(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"checkpoint {path}: not a cosa_fast checkpoint; weights go in by model.weights={path}")
    return state


def load_networks(path: str | Path, device: str = "cpu") -> Networks:
    """Both networks of a checkpoint in eval mode, with their configuration; raises UserError as `load` does."""
    state = load(path, device)
    config = config_from_dict(state["config"], ["model.weights=none"], where=str(path))
    classes = tuple(state["classes"])
    networks = [build_model(config.model, len(classes)) for _ in range(2)]
    for network, key in zip(networks, ("student", "teacher"), strict=True):
        network.load_state_dict(state[key])
        network.to(device).eval().requires_grad_(False)
    return Networks(config, classes, int(state["iteration"]), networks[0], networks[1], _thresholds(config, state))


def _thresholds(config: Config, state: dict[str, Any]) -> tuple[float | None, float | None]:
    if int(state["iteration"]) <= config.optim.cotrain_after or config.threshold.mode == "band":
        return None, None
    if config.threshold.mode == "fixed":
        return config.threshold.value, config.threshold.value_aux
    values = [float(item["value"]) for item in state["thresholds"]]
    return values[0], values[1]
