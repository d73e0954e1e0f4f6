"""A network as a configuration describes it, with its weights."""

import logging

from torch import nn

from cosa_fast.config.schema import ModelConfig
from cosa_fast.network.encoder import Encoder, create_backbone
from cosa_fast.network.model import CoSANet
from cosa_fast.network.reading import is_whole_network
from cosa_fast.network.standalone import StandaloneNet, build_standalone
from cosa_fast.network.weights import import_official, load_backbone, pretrained_backbone, read_weights

logger = logging.getLogger(__name__)
# What is evaluated, predicts and is exported.
SegmentationNetwork = CoSANet | StandaloneNet


def build_network(config: ModelConfig, num_classes: int) -> SegmentationNetwork:
    """The network of `config.architecture`. UserError as build_model, or as build_standalone."""
    return build_standalone(config, num_classes) if config.standalone else build_model(config, num_classes)


def build_model(config: ModelConfig, num_classes: int) -> CoSANet:
    """The network with the weights that `config.weights` asks for; says so in its `origin`, and logs one line.

    "hub": timm's pre-trained backbone; "none": random; else a file with backbone weights, or with a whole network in
    the naming of the official release. UserError: unknown backbone, unreachable hub, a file that does not fit.
    """
    if config.weights == "hub":
        backbone, report = pretrained_backbone(config.backbone, config.arguments)
        model = _around(backbone, config, num_classes)
    else:
        model = _around(create_backbone(config.backbone, config.arguments), config, num_classes)
        report = _load_file(config, model)
    model.origin = report
    logger.info("%s: %s; %s", config.backbone, report, _describe(model.encoder))
    return model


def _around(backbone: nn.Module, config: ModelConfig, num_classes: int) -> CoSANet:
    plain = config.position_resampling == "plain"
    return CoSANet(Encoder(backbone, config.aux_layer, config.checkpoint_blocks, plain), num_classes, config)


def _load_file(config: ModelConfig, model: CoSANet) -> str:
    if config.weights == "none":
        return "random weights"
    weights = read_weights(config.weights)
    if is_whole_network(weights.state):
        return import_official(weights, model, name=config.weights)
    report = load_backbone(model.encoder, weights.state, source=config.weights)
    return "; ".join([report, *weights.notes])


def _describe(encoder: Encoder) -> str:
    size = f"stride {encoder.stride}, width {encoder.width}"
    if encoder.aux_name is None:
        return f"{size}, no auxiliary layer"
    return f"{size}, auxiliary layer {encoder.aux_name} (width {encoder.width_aux})"
