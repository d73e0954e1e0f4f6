"""An exported .safetensors file: one network, and in the metadata all that it takes to run it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch

from cosa_fast.config.parsing import config_from_dict, config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError, one_line
from cosa_fast.network.build import SegmentationNetwork, build_network

# Of the metadata, one text.
KEY, VERSION = "cosa_fast", 1


class Exported(NamedTuple):
    """thresholds: (ξ, ξ†), None where the run had none. chosen: as in `Networks`."""

    config: Config
    classes: tuple[str, ...]
    network: SegmentationNetwork
    thresholds: tuple[float | None, float | None]
    iteration: int
    chosen: Mapping[str, Any]


def write_export(
    path: Path,
    network: SegmentationNetwork,
    config: Config,
    classes: tuple[str, ...],
    thresholds: tuple[float | None, float | None],
    iteration: int,
    chosen: Mapping[str, Any],
) -> None:
    """Write the file, without places on this machine."""
    about = {
        "version": VERSION,
        "iteration": iteration,
        "classes": classes,
        "thresholds": thresholds,
        "chosen": dict(chosen),
        "config": _public(config),
    }
    state = {key: tensor.detach().contiguous().cpu() for key, tensor in network.state_dict().items()}
    path.write_bytes(safetensors.torch.save(state, {KEY: json.dumps(about)}))


def read_export(path: Path) -> Exported | None:
    """What `write_export` wrote, on the CPU; None for a .safetensors file of another program, or one that cannot be
    read at all. UserError for one that is damaged or of another version."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                return None
            about = json.loads(metadata[KEY])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dictionary)
        if about["version"] != VERSION:
            raise ValueError(f"version {about['version']}, want {VERSION}")
        config = config_from_dict(about["config"], ["model.weights=none"], where=str(path))
        classes = tuple(str(name) for name in about["classes"])
        network = build_network(config.model, len(classes))
        network.load_state_dict(state)
        xi, xi_aux = (None if value is None else float(value) for value in about["thresholds"])
        chosen = dict(about.get("chosen") or {})
        return Exported(config, classes, network, (xi, xi_aux), int(about["iteration"]), chosen)
    except safetensors.SafetensorError:
        return None
    except UserError:
        raise
    except Exception as error:  # what comes out of a file can be anything
        raise UserError(f"{path}: damaged, or no export of this version ({one_line(error, 200)})") from error


def _public(config: Config) -> dict[str, Any]:
    values = config_to_dict(config)
    for section, keys in {
        "data": ("root", "labels", "pack", "pseudo_labels"),
        "model": ("weights",),
        "run": ("output", "name"),
    }.items():
        for key in keys:
            del values[section][key]
    return values
