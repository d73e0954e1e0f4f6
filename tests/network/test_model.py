"""The network: its maps and logits, the gradient switches, how it starts."""

import math

import pytest
import torch
from torch.nn import functional

from cosa_fast.config.schema import ModelConfig
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet

CLASSES = 3
IMAGES = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))


def make(**settings) -> CoSANet:
    torch.manual_seed(0)
    settings = {"backbone": "test_vit", "weights": "none", "decoder_width": 16} | settings
    return build_model(ModelConfig(**settings), CLASSES)


def gradients(model: CoSANet, value: torch.Tensor) -> tuple[bool, bool, bool]:
    """Whether the encoder, W and W† get a gradient from `value`."""
    model.zero_grad()
    if value.requires_grad:
        value.backward()
    encoder = any(parameter.grad is not None for parameter in model.encoder_parameters())
    return encoder, model.classifier.weight.grad is not None, model.classifier_aux.weight.grad is not None


def test_shapes_of_all_outputs():
    outputs = make()(IMAGES)
    assert outputs.logits.shape == outputs.logits_aux.shape == (2, CLASSES)
    assert outputs.cam.shape == outputs.cam_aux.shape == (2, CLASSES, 3, 4)
    assert outputs.seg.shape == (2, CLASSES + 1, 3, 4)


def test_logits_and_cams_are_the_classifier_on_pooled_and_on_plain_features():
    model = make().eval()
    with torch.no_grad():
        outputs = model(IMAGES)
        for features, classifier, logits, cam in zip(
            model.encoder(IMAGES),
            (model.classifier, model.classifier_aux),
            (outputs.logits, outputs.logits_aux),
            (outputs.cam, outputs.cam_aux),
            strict=True,
        ):
            weight = classifier.weight[:, :, 0, 0]
            torch.testing.assert_close(logits, features.flatten(2).max(-1).values @ weight.T)
            torch.testing.assert_close(cam, torch.einsum("bdhw,cd->bchw", features, weight))
    assert outputs.cam.min() < 0, "CAMs are raw: signed"


def test_segmentation_is_skipped_on_request_and_nothing_else_changes():
    model = make().eval()
    with torch.no_grad():
        full, lean = model(IMAGES), model(IMAGES, seg=False)
    assert lean.seg is None
    torch.testing.assert_close(lean._replace(seg=full.seg), full)


def test_without_aux_layer_there_is_no_auxiliary_head():
    model = make(aux_layer=None)
    outputs = model(IMAGES)
    assert model.classifier_aux is None
    assert outputs.logits_aux is None
    assert outputs.cam_aux is None
    assert not [key for key in model.state_dict() if "aux" in key]


@pytest.mark.parametrize(
    ("detach", "encoder", "weights"),
    [("none", True, True), ("features", False, True), ("weights", True, False), ("both", False, False)],
)
def test_detach_switches_act_on_the_cams_and_on_nothing_else(detach, encoder, weights):
    model = make(detach=detach)
    assert gradients(model, model(IMAGES).cam.sum()) == (encoder, weights, False)
    assert gradients(model, model(IMAGES).cam_aux.sum()) == (encoder, False, weights)
    assert gradients(model, model(IMAGES).logits.sum()) == (True, True, False)
    assert gradients(model, model(IMAGES).logits_aux.sum()) == (True, False, True)
    assert gradients(model, model(IMAGES).seg.sum()) == (True, False, False)


@pytest.mark.parametrize("detach", ["features", "weights", "both"])
def test_detach_switches_leave_the_values_alone(detach):
    torch.testing.assert_close(make(detach=detach).eval()(IMAGES), make().eval()(IMAGES))


@pytest.mark.parametrize("backbone", ["test_vit", "resnet18"])
def test_segmentation_starts_near_uniform(backbone):
    outputs = make(backbone=backbone, decoder_width=64)(IMAGES)
    target = torch.randint(0, CLASSES + 1, (2, 3, 4))
    assert functional.cross_entropy(outputs.seg, target).item() == pytest.approx(math.log(CLASSES + 1), abs=0.1)


def test_segmentation_head_is_largefov():
    decoder = make(decoder_width=24, decoder_dilation=3).decoder
    layers = [(layer.kernel_size, layer.dilation, layer.out_channels, layer.bias) for layer in decoder.children()]
    assert layers == [((3, 3), (3, 3), 24, None), ((3, 3), (3, 3), 24, None), ((1, 1), (1, 1), CLASSES + 1, None)]


def test_parameters_split_into_encoder_and_heads_without_the_frozen_ones():
    model = make()
    encoder, heads = model.encoder_parameters(), model.head_parameters()
    assert len(heads) == 5
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert set(encoder) | set(heads) == trainable
    assert len(encoder) + len(heads) == len(trainable)
    sum(value.square().sum() for value in model(IMAGES)).backward()
    assert all(parameter.grad is not None for parameter in trainable)


def test_cnn_with_its_own_auxiliary_width():
    outputs = make(backbone="tf_efficientnet_lite0")(IMAGES)
    assert outputs.cam.shape == outputs.cam_aux.shape == (2, CLASSES, 3, 4)


def test_one_line_tells_what_was_built(caplog):
    with caplog.at_level("INFO", logger="cosa_fast.network.build"):
        make(backbone="tf_efficientnet_lite0")
    [line] = caplog.messages
    assert line == ("tf_efficientnet_lite0: random weights; stride 16, width 1280, auxiliary layer stage 3 (width 112)")
