"""Weights for the network: timm's hub, local backbone files, whole networks in the official release's naming (read by
network/reading.py).

Nothing is loaded in part: a tensor that is missing, left over or of another shape is a UserError that names it. What
is dropped (classifier heads, parts without use here) or resampled (position embedding, patch kernel) is reported.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Tensor, nn

from cosa_fast.network import torchvision_compat  # noqa: F401  (must come before timm)

import timm  # isort: skip

from cosa_fast.errors import UserError, one_line
from cosa_fast.files import nearest
from cosa_fast.network.encoder import Encoder, check_name, create_backbone
from cosa_fast.network.model import CoSANet
from cosa_fast.network.reading import State, UnreadableError, Weights, is_whole_network, network_in, read_file

_BACKBONE_PREFIXES = ("backbone.", "encoder.")
# timm models name their own classifiers; these are the names that checkpoints of other origin use.
_HEAD_NAMES = ("head", "head_dist", "fc", "classifier")
# Batch norm never updates its statistics here, so this counter is read by nobody.
_OPTIONAL_SUFFIX = "num_batches_tracked"
_HUB_TIMEOUT_SECONDS = 5.0
_SHOWN_KEYS = 3


def pretrained_backbone(name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """timm's backbone with its pre-trained weights from the hub (or its cache), and the report.

    UserError, within seconds, if the hub cannot be reached, has no weights, or they do not fit `arguments`.
    """
    check_name(name)
    if not _hub_reachable() and not _in_cache(name):
        raise UserError(
            f"model.weights=hub: {huggingface_hub.constants.ENDPOINT} cannot be reached, {name} is not in the cache; "
            "download the weights elsewhere and give the file as model.weights=PATH, or start from model.weights=none"
        )
    try:
        backbone = create_backbone(name, arguments, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # timm, torch, the hub client and its HTTP library each raise their own kinds
        raise UserError(
            f"model.weights=hub: loading {name}: {one_line(error)}; or give a file as model.weights=PATH"
        ) from error
    count = len(backbone.state_dict())
    return backbone, f"{count} of {count} tensors from the hub"


def read_weights(path: str | Path) -> Weights:
    """The network in a .safetensors, .pth, .pt or .bin file; UserError if unreadable."""
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else f"no such file{nearest(file)}"
        raise UserError(f"model.weights={path}: {what}; give hub, none or a .safetensors, .pth, .pt or .bin file")
    try:
        content = read_file(file)
    except UnreadableError as error:
        raise UserError(f"model.weights={path}: cannot be read: {error}; {error.remedy}") from error
    return network_in(content, str(path))


def read_state(path: str | Path) -> State:
    """The tensors of `read_weights`."""
    return read_weights(path).state


def load_backbone(encoder: Encoder, state: Mapping[str, Tensor], *, source: str) -> str:
    """Load backbone weights into `encoder`; returns the report. `source` names the file in errors.

    Half-precision tensors are upcast. UserError if a tensor is missing, unexpected or of another shape.
    """
    fitted, notes = _fit_backbone(encoder, dict(state), source)
    encoder.backbone.load_state_dict(fitted, strict=False)
    return "; ".join([f"{len(fitted)} of {len(encoder.backbone.state_dict())} tensors from {source}", *notes])


def import_official(
    source: str | Path | Mapping[str, Any] | Weights, model: CoSANet, *, name: str = "the given state dict"
) -> str:
    """Load a whole network in the naming of the official release into `model`; returns the report.

    That naming: `encoder.*` as timm's ViT, `decoder.conv6/7/8`, `classifier`, `aux_classifier`; CoSANet's own naming is
    taken as well. `source`: a file, what torch.load gave, or what was read of a file; `name` names the latter two in
    errors. A position embedding of another grid is interpolated to the model's; give model.arguments.img_size to keep
    it as it is.
    UserError: no such network in it, another number of classes, or tensors that do not fit; then nothing is loaded.
    """
    if isinstance(source, str | Path):
        weights, name = read_weights(source), str(source)
    else:
        weights = source if isinstance(source, Weights) else network_in(source, name)
    state = weights.state
    if not is_whole_network(state):
        raise UserError(
            f"{name}: holds no CoSA network (encoder.*, decoder.conv6.weight, classifier.weight); give another file"
        )
    classes = state["classifier.weight"].shape[0]
    if classes != model.num_classes:
        raise UserError(
            f"{name}: was trained on {classes} classes, the data set has {model.num_classes}; "
            "give the same class list (data.classes), or only its backbone"
        )
    encoder_state = {key: tensor for key, tensor in state.items() if key.startswith("encoder.")}
    backbone, notes = _fit_backbone(model.encoder, encoder_state, name)
    heads = {
        _rename(key, "aux_classifier.", "classifier_aux."): tensor.float()
        for key, tensor in state.items()
        if key not in encoder_state
    }
    if model.classifier_aux is None and heads.pop("classifier_aux.weight", None) is not None:
        notes.append("dropped aux_classifier")
    expected = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("encoder.")}
    require_fitting(heads, expected, name, "set model.decoder_width and model.aux_layer as they were")
    fitted = heads | {f"encoder.backbone.{key}": tensor for key, tensor in backbone.items()}
    model.load_state_dict(fitted, strict=False)
    if is_of_release(state) and not model.encoder.plain_positions and model.encoder.is_vit:
        notes.append("trained with model.position_resampling=plain, which differs")
    report = f"{len(fitted)} of {len(model.state_dict())} tensors (whole network) from {name}"
    return "; ".join([report, *weights.notes, *notes])


def is_of_release(state: Mapping[str, Tensor]) -> bool:
    """Whether a whole network has the names of the official release, of ToCo, SeCo or DuPL, not CoSANet's own."""
    return not any(key.startswith("encoder.backbone.") for key in state)


def _rename(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key


def _fit_backbone(encoder: Encoder, state: State, source: str) -> tuple[State, list[str]]:
    """`state` under the names and in the shapes of `encoder.backbone`, and notes on what was dropped or resampled."""
    inner, dropped = split_backbone(state)
    upcast = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in inner.items()}
    converted = _timm_filter(encoder, upcast, source)
    if encoder.norm_was_pooled:
        converted = {_rename(key, "fc_norm.", "norm."): tensor for key, tensor in converted.items()}
    expected = encoder.backbone.state_dict()
    heads = tuple(f"{name}." for name in {*_HEAD_NAMES, *_own_heads(encoder.backbone), *encoder.removed})
    fitted = {key: tensor for key, tensor in converted.items() if key in expected or not key.startswith(heads)}
    dropped += [key for key in converted if key not in fitted]
    remedy = "set model.backbone and model.arguments to the architecture the file comes from"
    require_fitting(fitted, expected, source, remedy)
    resampled = [
        f"resampled {key} {_shape(inner[key])} to {_shape(tensor)}"
        for key, tensor in fitted.items()
        if key in inner and inner[key].shape != tensor.shape
    ]
    return fitted, resampled + ([f"dropped {', '.join(dropped)}"] if dropped else [])


def require_fitting(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, remedy: str) -> None:
    """UserError that shows the first tensors that are missing, unexpected or of another shape."""
    missing = [key for key in expected if key not in given and not key.endswith(_OPTIONAL_SUFFIX)]
    unexpected = [key for key in given if key not in expected]
    wrong = [key for key in given if key in expected and given[key].shape != expected[key].shape]
    faults = [
        _list_keys("missing", [f"{key} {_shape(expected[key])}" for key in missing]),
        _list_keys("unexpected", [f"{key} {_shape(given[key])}" for key in unexpected]),
        _list_keys("wrong shape", [f"{key} {_shape(given[key])}, not {_shape(expected[key])}" for key in wrong]),
    ]
    if any(faults):
        raise UserError(f"{source}: does not fit the model: {'; '.join(filter(None, faults))}; {remedy}")
    bad = [key for key, tensor in given.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if bad:
        shown = _list_keys("tensors with NaN or infinity", bad)
        raise UserError(f"{source}: {shown}; the file is damaged or its training diverged: take another one")


def _list_keys(fault: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = ", ..." if len(entries) > _SHOWN_KEYS else ""
    return f"{len(entries)} {fault} ({', '.join(entries[:_SHOWN_KEYS])}{more})"


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "scalar"


def _timm_filter(encoder: Encoder, state: State, source: str) -> State:
    """timm's own conversion of foreign names and sizes, where the backbone's family has one; positions are resampled as
    the encoder does it."""
    backbone = encoder.backbone
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    plain = encoder.plain_positions and "antialias" in inspect.signature(convert).parameters
    try:
        return dict(convert(state, backbone, **({"antialias": False} if plain else {})))
    except Exception as error:  # what a filter raises on weights of another family is anything from KeyError on
        raise UserError(
            f"{source}: does not fit {type(backbone).__name__} ({one_line(error)}); set model.backbone to match it"
        ) from error


def _own_heads(backbone: Any) -> tuple[str, ...]:
    names = backbone.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def split_backbone(state: State) -> tuple[State, list[str]]:
    """The backbone's tensors without prefix, and the parts beside it: heads, projectors of whatever trained it."""
    outside: set[str] = set()
    while prefix := next((one for one in _BACKBONE_PREFIXES if any(key.startswith(one) for key in state)), None):
        outside |= {key.split(".")[0] for key in state if not key.startswith(prefix)}
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    return state, sorted(outside)


@contextmanager
def hub_reached() -> Iterator[None]:
    """To download in, for libraries with their own ways to the hub: where it cannot be reached they have its cache
    alone, and are told so at once."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _hub_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_reachable() -> bool:
    """One request without the retries, which would hold the user up for a minute."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception:  # the HTTP library behind the client differs between its versions
        return False
    return True


def _in_cache(name: str) -> bool:
    configuration = timm.get_pretrained_cfg(name)
    if configuration is None or not configuration.hf_hub_id:
        return False
    files = (configuration.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
    return any(isinstance(huggingface_hub.try_to_load_from_cache(configuration.hf_hub_id, f), str) for f in files if f)
