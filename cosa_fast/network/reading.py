"""Weight files of any origin, read safely, and the network in them: below which key it lies, in which wrappers, which
of several copies it is, and what the file says of its settings.

Nothing in a file is executed: torch's restricted reader takes tensors, plain values and the inert types listed here.
"""

import argparse
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from cosa_fast.errors import UserError, first_line

State = dict[str, Tensor]

# Training scripts save their command line and best score beside the weights, by any numpy, on any system.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS = [
    "bool",
    *(f"float{bits}" for bits in (16, 32, 64)),
    *(f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64)),
]
_INERT: list[Any] = [
    argparse.Namespace,
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(name)) for name in _NUMBERS),
]

# Where scripts keep a network, as a key of the file or as the first part of every name: moving averages first.
_AVERAGES = ("model_ema", "ema_model", "ema", "ema_state_dict", "state_dict_ema", "model_ema_state_dict", "teacher")
_NETWORKS = ("state_dict", "model_state_dict", "model", "net", "network", "online_model", "student", "branch1")
_PLACES = (*_AVERAGES, *_NETWORKS, "shadow", "branch2")
_WRAPPERS = {"module", "_orig_mod"}
# What averages count beside the weights.
_COUNTERS = {"n_averaged", "num_updates", "initted", "step", "decay"}
# Parts of ToCo and SeCo that no output depends on: projection heads, key encoders, queues of their contrastive losses.
_ASIDE = re.compile(r"(proj_head|projector|encoder_k|prototypes|queue)")
_SETTINGS = ("args", "hyper_parameters", "config", "cfg")
_AGAIN = "copy or download it again, or take another file"
# A mapping may hold itself; no training script wraps deeper.
_DEEPEST = 8


class UnreadableError(Exception):
    """A file that is no weight file, or a damaged one; the message is the reason, in a few words. `remedy`: what to
    do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class _DamagedError(Exception):
    """The message is a reason."""


@dataclass(frozen=True)
class Weights:
    """What a file holds. `state`: the network's tensors, without wrappers. `notes`: which copy was taken, and what was
    left out. `settings`: what the script that wrote the file says of itself, by the script's names; not checked."""

    state: State
    notes: tuple[str, ...]
    settings: dict[str, Any]


def read_file(path: Path, device: str | torch.device = "cpu") -> Any:
    """What was saved in a .safetensors file or with torch.save, the checksums of whose archive are compared first.
    UnreadableError if it is something else, or holds other objects than weights and plain values."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device=str(device))
        if zipfile.is_zipfile(path):
            _verify(path)
        with torch.serialization.safe_globals(_INERT), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other protocols, which are read or refused
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # what a damaged pickle raises depends on its bytes: KeyError, struct.error ...
        raise UnreadableError(*_reason(error, path)) from error


def _verify(path: Path) -> None:
    """Compare every part of the archive with its CRC-32, which torch writes and does not read."""
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise _DamagedError("it is compressed, which no checkpoint is")
        damaged = archive.testzip()
    if damaged is not None:
        raise _DamagedError(f"it is damaged: wrong checksum of {damaged}")


def _reason(error: Exception, path: Path) -> tuple[str, str]:
    """(what is wrong, what to do). torch's own message is a page long, and meant for who would execute the file."""
    foreign = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
    if foreign:
        reason = f"it holds a Python object, {foreign[1]}, and only weights and plain values are read"
        return reason, "save the state dict alone"
    if isinstance(error, PermissionError | IsADirectoryError):
        return first_line(error), "give a file that can be read"
    if isinstance(error, _DamagedError):
        return str(error), _AGAIN
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, which stands for the file", "get the file itself with git lfs pull"
    if head.lstrip().startswith(b"<"):
        return "it is a web page", "download the file itself"
    if not head:
        return "it is empty", _AGAIN
    if path.suffix in (".onnx", ".pt2"):
        return "it is a graph for other programs", "give a checkpoint, or export it as safetensors"
    cut_short = isinstance(error, EOFError) or "unexpected EOF" in str(error)
    if path.suffix == ".safetensors" or head.startswith(b"PK\x03\x04") or cut_short:
        return "it is truncated or damaged", _AGAIN
    return "it is damaged, or not written by torch.save", f"{_AGAIN}: .safetensors, .pth, .pt or .bin"


def network_in(content: Any, source: str) -> Weights:
    """The network's weights in what a file held; `source` names the file in errors. UserError if there are none."""
    settings = _settings(content)
    state, notes = _state_in(content, source)
    if is_whole_network(state):
        aside = sorted({key.split(".")[0] for key in state if _ASIDE.match(key)})
        state = {key: tensor for key, tensor in state.items() if key.split(".")[0] not in aside}
        notes += [f"left out {', '.join(aside)}"] if aside else []
    return Weights(state, tuple(notes), settings)


def is_whole_network(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a whole CoSA network (official release or CoSANet's own), not of a backbone."""
    return "classifier.weight" in state and any(key.startswith("decoder.") for key in state)


def _state_in(content: Any, source: str) -> tuple[State, list[str]]:
    notes: list[str] = []
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            break
        copies = [key for key in _PLACES if _holds_tensors(content.get(key))]
        if copies:
            notes += _choice(copies)
            content = content[copies[0]]
            continue
        state = _without_wrappers(content)
        copies = [place for place in _PLACES if _is_place(place, state)]
        if not copies:
            if state:
                return state, notes
            break
        notes += _choice(copies)
        content = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{copies[0]}.")}
    raise UserError(f"{source}: holds no state dict; give one, or a mapping with it under {', '.join(_NETWORKS[:3])}")


def _choice(copies: list[str]) -> list[str]:
    """What is said of the copy taken: nothing where there was no choice."""
    if len(copies) == 1:
        return []
    return [f"took {copies[0]}, left out {', '.join(copies[1:])}"]


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if not isinstance(value, Mapping) or depth > _DEEPEST:
        return False
    return any(isinstance(item, Tensor) or _holds_tensors(item, depth + 1) for item in value.values())


def _without_wrappers(content: Mapping[Any, Any]) -> State:
    """The tensors, without the parts of their names that wrappers of a network add, and without counters."""
    tensors = {_unwrapped(str(key)): value for key, value in content.items() if isinstance(value, Tensor)}
    return {key: tensor for key, tensor in tensors.items() if key not in _COUNTERS or tensor.numel() > 1}


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _is_place(place: str, state: State) -> bool:
    """Whether names begin with `place`, and either all begin so, or there is a whole network behind it."""
    if not any(key.startswith(f"{place}.") for key in state):
        return False
    return f"{place}.classifier.weight" in state or all(key.split(".")[0] in _PLACES for key in state)


def _settings(content: Any) -> dict[str, Any]:
    """The script's command line and counters, where the file has them."""
    if not isinstance(content, Mapping):
        return {}
    found: dict[str, Any] = {}
    for name in _SETTINGS:
        value = content.get(name)
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            found |= {str(key): item for key, item in value.items()}
    plain = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, int | str)}
    return {**found, **plain}
