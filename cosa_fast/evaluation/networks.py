"""Networks back from a file: a checkpoint, or weights that another program wrote (imported.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosa_fast.config.parsing import completed, config_from_dict
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError, one_line
from cosa_fast.evaluation.exported import read_export
from cosa_fast.evaluation.imported import import_network
from cosa_fast.files import nearest
from cosa_fast.network.build import SegmentationNetwork, build_network
from cosa_fast.network.reading import UnreadableError, read_file

FORMAT = 1
# Checkpoints, results.json and log.jsonl call ON student and AN teacher.
NAMES_IN_FILES = {"on": "student", "an": "teacher"}
# What evaluation and prediction need of a checkpoint.
PARTS = {"iteration": int, "config": dict, "classes": list, "student": dict, "teacher": dict, "thresholds": list}


@dataclass(frozen=True)
class Networks:
    """What evaluation and prediction need of a checkpoint. `thresholds`: (ξ, ξ†), each None where the run had none yet,
    or has none at all. `imported`: what was read, where another program wrote the file; `on` and `an` are one network
    then, and `classes` are guessed by their number. `chosen`: of a best.pt, the figure by which it is the best, and the
    split that this was measured on."""

    config: Config
    classes: tuple[str, ...]
    iteration: int
    on: SegmentationNetwork
    an: SegmentationNetwork
    thresholds: tuple[float | None, float | None]
    imported: str | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def single(self) -> bool:
        """Whether one network stands for both: an imported, an exported or a standalone one."""
        return self.on is self.an

    @property
    def bias(self) -> str | None:
        """What must be said beside figures on the images that a checkpoint was chosen on; None for all others."""
        if not self.chosen.get("on"):
            return None
        by, value = self.chosen.get("by"), self.chosen.get("value")
        return f"chosen by {by} = {value:.2f} on {self.chosen['on']}: figures on the same images are too high"

    def for_classes(self, names: Sequence[str]) -> "Networks":
        """Imported networks under the names of a data set that has as many classes; others as they are."""
        fits = self.imported is not None and len(names) == len(self.classes)
        return replace(self, classes=tuple(names)) if fits else self

    def named(self, name: str) -> SegmentationNetwork:
        """The network "on" or "an"."""
        return {"on": self.on, "an": self.an}[name]


def title(name: str, config: Config) -> str:
    """What people read for the network "on" or "an": ON or AN, or the architecture of a standalone one."""
    return config.model.architecture if config.model.standalone else name.upper()


def load(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The dictionary in a checkpoint, as run/checkpoint.py saved it, after its checksums were found right. Raises
    UserError when the file is missing, damaged, or something else."""
    content = _read(Path(path), device)
    if not is_checkpoint(content):
        raise UserError(f"checkpoint {path}: not a cosa_fast checkpoint; weights go in by model.weights={path}")
    return _completed(content)


def is_checkpoint(content: Any) -> bool:
    """Whether what a file held is a checkpoint of cosa_fast."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def _read(path: Path, device: str | torch.device) -> Any:
    if path.is_dir():
        files = sorted([*path.glob("*.pt"), *path.glob("checkpoints/*.pt")])
        advice = f"one of {files[-1].parent}/, for example {files[-1].name}" if files else "a file"
        raise UserError(f"checkpoint {path}: is a folder; give {advice}")
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file{nearest(path)}; checkpoints are in runs/NAME/checkpoints/")
    try:
        return read_file(path, device)
    except UnreadableError as error:
        raise UserError(f"checkpoint {path}: cannot be read: {error}; {error.remedy}") from error


def _completed(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with the settings that were not there when it was written."""
    return {**state, "config": completed(state["config"])} if "config" in state else state


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


def load_networks(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    config: str | None = None,
    overrides: Sequence[str] = (),
) -> Networks:
    """Both networks of a checkpoint in eval mode, with their configuration; the one network of an exported file, with
    its own; or the one network of any other weight file, for which `config` (a YAML file) and `overrides` tell what the
    file does not (imported.py).

    UserError: a file that cannot be read, a checkpoint that is not whole, weights that do not fit; `config` given for a
    checkpoint, which has its own.
    """
    exported = _exported(Path(path), device) if config is None else None
    if exported is not None:
        return exported
    content = _read(Path(path), device)
    if not is_checkpoint(content):
        found, classes, network, report, iteration = import_network(content, str(path), config, overrides)
        network = network.to(device).eval().requires_grad_(False)
        return Networks(found, classes, iteration, network, network, (None, None), report)
    if config is not None:
        raise UserError(f"--config {config}: {path} has a configuration of its own; change it with key=value")
    return _of_checkpoint(_completed(content), path, device)


def _exported(path: Path, device: str | torch.device) -> Networks | None:
    """What `export` wrote: one network, which stands for both."""
    found = read_export(path) if path.suffix == ".safetensors" and path.is_file() else None
    if found is None:
        return None
    network = found.network.to(device).eval().requires_grad_(False)
    return Networks(found.config, found.classes, found.iteration, network, network, found.thresholds)


def _of_checkpoint(state: dict[str, Any], path: str | Path, device: str | torch.device) -> Networks:
    require_whole(state, path)
    config = config_from_dict(state["config"], ["model.weights=none"], where=str(path))
    classes, iteration = tuple(state["classes"]), state["iteration"]

    def network(name: str) -> SegmentationNetwork:
        built = build_network(config.model, len(classes))
        built.load_state_dict(state[NAMES_IN_FILES[name]])
        return built.to(device).eval().requires_grad_(False)

    try:
        thresholds = _thresholds(config, iteration, state)
        chosen = state.get("chosen")
        an = network("an")
        return Networks(
            config,
            classes,
            iteration,
            an if config.model.standalone else network("on"),
            an,
            thresholds,
            chosen=chosen if isinstance(chosen, dict) else {},
        )
    except UserError:
        raise
    except Exception as error:  # what came out of the file can be anything
        raise UserError(
            f"checkpoint {path}: does not fit its own configuration ({one_line(error, 200)}); take another checkpoint"
        ) from error


def has_thresholds(config: Config, iteration: int) -> bool:
    """Whether a run has single thresholds ξ and ξ† after so many iterations: not before co-training, nor with bands,
    nor with a standalone network."""
    single = config.threshold.mode != "band" and not config.model.standalone
    return single and iteration > config.optim.cotrain_after


def _thresholds(config: Config, iteration: int, state: dict[str, Any]) -> tuple[float | None, float | None]:
    if not has_thresholds(config, iteration):
        return None, None
    if config.threshold.mode == "fixed":
        return config.threshold.value, config.threshold.value_aux
    xi, xi_aux = (float(item["value"]) for item in state["thresholds"])
    return xi, xi_aux
