"""The network of CoSA-MS: an encoder and decoder of segmentation_models_pytorch, without classifier and CAM."""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cosa_fast.network import torchvision_compat  # noqa: F401  (must come before timm)

import timm  # isort: skip

from cosa_fast.config.schema import ModelConfig
from cosa_fast.errors import UserError, hint, one_line
from cosa_fast.network.model import Outputs
from cosa_fast.network.weights import hub_reached, read_weights, require_fitting, split_backbone

INSTALL = 'pip install -c constraints.txt -e ".[ms]"'
# What segmentation_models_pytorch calls timm's encoders.
TIMM = "tu-"
# What the network is built with besides model.arguments.
_RESERVED_ARGUMENTS = ("encoder_name", "encoder_weights", "classes", "in_channels")
# Sides of an image that tells whether an encoder takes any size: multiples of every stride.
_PROBE = (1, 3, 64, 96)
# A class whose probability is 0 or 1 in float32 has no finite logit.
_LEAST_PROBABILITY = 1e-6


class StandaloneNet(nn.Module):
    """DeepLabV3+, SegFormer or UPerNet for C classes and the background; K = C + 1.

    stride: what the sides of images must be multiples of. origin: where the weights come from, in words.
    """

    def __init__(self, network: Any, num_classes: int, origin: str) -> None:
        super().__init__()
        self.network: Any = network
        self.stride = int(network.encoder.output_stride)
        self.num_classes = num_classes
        self.origin = origin

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, which images must have."""
        return next(self.network.parameters()).dtype

    def segment(self, images: Tensor) -> Tensor:
        """S (B, K, H, W) of normalised images (B, 3, H, W)."""
        return self.network(images)

    def forward(self, images: Tensor, seg: bool = True) -> Outputs:
        """As CoSANet's, for evaluation: S at the size of the images, an empty M (B, 0, H, W), and as Z of a class the
        log odds of that class at the pixel that is surest of it."""
        segmentation = self.segment(images)
        surest = segmentation.float().softmax(1)[:, 1:].amax(dim=(2, 3))
        return Outputs(surest.logit(_LEAST_PROBABILITY), segmentation[:, :0], segmentation if seg else None, None, None)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Those of the encoder."""
        return list(self.network.encoder.parameters())

    def head_parameters(self) -> list[nn.Parameter]:
        """Those of decoder and segmentation head."""
        return [*self.network.decoder.parameters(), *self.network.segmentation_head.parameters()]


def build_standalone(config: ModelConfig, num_classes: int) -> StandaloneNet:
    """The network of `config.architecture` around the encoder `config.backbone`, with the weights that
    `config.weights` asks for: "hub", "none", or a file of the encoder's weights.

    UserError: segmentation_models_pytorch is missing, it has no such encoder, arguments that nothing takes, the encoder
    does not go with the architecture or takes no images of any size, an unreachable hub, a file that does not fit.
    """
    library = _library()
    _check_encoder(library, config.backbone)
    _check_arguments(library, config)
    hub = config.weights == "hub"
    network = _create(library, config, num_classes, hub)
    origin = "random weights"
    if hub:
        origin = f"the hub's weights of {config.backbone}"
    elif config.weights != "none":
        weights = read_weights(config.weights)
        report = load_encoder(network.encoder, weights.state, source=config.weights)
        origin = "; ".join([report, *weights.notes])
    _probe(network, config, num_classes)
    return StandaloneNet(network, num_classes, origin)


def load_encoder(encoder: nn.Module, state: Mapping[str, Tensor], *, source: str) -> str:
    """Load an encoder's weights, under timm's names for one of timm's; returns the report. UserError that names
    `source` for a tensor that is missing or of another shape."""
    inner, dropped = split_backbone(dict(state))
    expected = encoder.state_dict()
    found = {key: name for key in expected if (name := _name_in(inner, key)) is not None}
    fitted = {key: _upcast(inner[name]) for key, name in found.items()}
    require_fitting(fitted, expected, source, "set model.backbone to the encoder that the file is of")
    encoder.load_state_dict({**expected, **fitted})
    dropped += sorted({key.partition(".")[0] for key in inner.keys() - set(found.values())})
    report = f"{len(fitted)} of {len(expected)} tensors of the encoder from {source}"
    return report + (f"; dropped {', '.join(dropped)}" if dropped else "")


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _name_in(state: Mapping[str, Tensor], key: str) -> str | None:
    """What a file calls the encoder's tensor `key`. timm's feature extractors write "stages_0" for "stages.0"."""
    key = key.removeprefix("model.")
    first, dot, rest = key.partition(".")
    places = [place for place, letter in enumerate(first) if letter == "_"]
    names = [key, *(f"{first[:place]}.{first[place + 1 :]}{dot}{rest}" for place in places)]
    return next((name for name in names if name in state), None)


def _library() -> Any:
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        raise UserError(
            f"model.architecture: {one_line(error)}; the standalone networks need segmentation_models_pytorch: "
            f"{INSTALL}"
        ) from error
    return segmentation_models_pytorch


def _check_encoder(library: Any, name: str) -> None:
    own = library.encoders.get_encoder_names()
    if name.startswith(TIMM):
        known = {f"{TIMM}{each}" for each in (*timm.list_models(), *timm.list_pretrained())}
        if name not in known:
            raise UserError(f"model.backbone: timm {timm.__version__} has no model {name!r}{hint(name, known)}")
    elif name not in own:
        of_timm = name in timm.list_models() or name in timm.list_pretrained()
        near = f"; timm's encoder of that name is {TIMM}{name}" if of_timm else hint(name, own)
        raise UserError(
            f"model.backbone: segmentation_models_pytorch has no encoder {name!r}{near}; it takes resnet50, mit_b2, "
            f"... and timm's models with {TIMM} before their names"
        )


def _check_arguments(library: Any, config: ModelConfig) -> None:
    """UserError for a name that the architecture does not take. The library hands such ones to the encoder: timm's
    refuse what they do not know, its own ignore everything."""
    known = _own_arguments(library, config)
    for name in config.arguments:
        if name in _RESERVED_ARGUMENTS:
            raise UserError(f"model.arguments.{name}: cosa_fast sets this one itself; remove it")
        if name not in known and not config.backbone.startswith(TIMM):
            raise UserError(
                f"model.arguments.{name}: {config.architecture} around {config.backbone} takes no such "
                f"argument{hint(name, known)}; it takes {', '.join(known)}"
            )


def _own_arguments(library: Any, config: ModelConfig) -> list[str]:
    """What the architecture takes, and the user may set."""
    taken = inspect.signature(getattr(library, config.architecture).__init__).parameters
    named = [name for name, each in taken.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    return [name for name in named if name not in ("self", *_RESERVED_ARGUMENTS)]


def _create(library: Any, config: ModelConfig, num_classes: int, hub: bool) -> Any:
    of_timm = config.backbone.startswith(TIMM)
    weights = ("imagenet" if not of_timm else True) if hub else None
    architecture = getattr(library, config.architecture)
    try:
        with hub_reached() if hub else nullcontext():
            return architecture(
                config.backbone, encoder_weights=weights, classes=num_classes + 1, **dict(config.arguments)
            )
    except Exception as error:  # the library, timm, torch, the hub client: each raises its own kinds
        remedy = "give a file as model.weights=PATH" if hub else "take another model.backbone, or model.arguments"
        own = _own_arguments(library, config)
        near = next((hint(name, own) for name in config.arguments if name not in own), "")
        raise UserError(
            f"model.architecture={config.architecture} around {config.backbone}: {one_line(error)}{near}; {remedy}"
        ) from error


def _probe(network: Any, config: ModelConfig, num_classes: int) -> None:
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.no_grad():
            size = tuple(network.eval()(torch.zeros(_PROBE)).shape)
    except Exception as error:  # as above
        raise UserError(
            f"model.backbone: {config.backbone} does not go with {config.architecture} and images of any size "
            f"({one_line(error)}); take another one, or set model.arguments"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    wanted = (_PROBE[0], num_classes + 1, *_PROBE[2:])
    if size != wanted:
        raise UserError(
            f"model.backbone: {config.backbone} in {config.architecture} gives maps of {size[2]}x{size[3]} for "
            f"{wanted[2]}x{wanted[3]} pixels; take another one"
        )
