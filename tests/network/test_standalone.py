"""The networks of CoSA-MS: what they give, where their weights come from, and what is refused."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cosa_fast.config.schema import ModelConfig
from cosa_fast.errors import UserError
from cosa_fast.network.encoder import create_backbone
from cosa_fast.network.standalone import StandaloneNet, build_standalone

pytest.importorskip("segmentation_models_pytorch")
CLASSES = 3


def make(
    architecture: str = "DeepLabV3Plus", backbone: str = "tu-test_resnet", weights: object = "none"
) -> StandaloneNet:
    return build_standalone(ModelConfig(architecture=architecture, backbone=backbone, weights=str(weights)), CLASSES)


@pytest.mark.parametrize("architecture", ["DeepLabV3Plus", "Segformer", "UPerNet"])
def test_an_architecture_gives_logits_at_the_size_of_the_images(architecture: str) -> None:
    network = make(architecture).eval()
    images = torch.randn(2, 3, 2 * network.stride, 3 * network.stride, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = network(images)
    segmentation = outputs.segmentation()
    assert segmentation.shape == (2, CLASSES + 1, *images.shape[2:])
    assert outputs.cam.shape[1] == 0
    surest = segmentation.softmax(1)[:, 1:].flatten(2).max(2).values
    torch.testing.assert_close(outputs.logits.sigmoid(), surest)
    learned = [*network.encoder_parameters(), *network.head_parameters()]
    assert sorted(map(id, learned)) == sorted(map(id, network.parameters())), "each in one group of the optimiser"


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_an_encoder_takes_all_its_weights_from_timms_file(name: str, tmp_path: Path) -> None:
    """test_convnext: timm's feature extractor writes stages_0 for stages.0."""
    torch.manual_seed(3)
    backbone = create_backbone(name, {})
    state = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    network = make(backbone=f"tu-{name}", weights=tmp_path / "weights.safetensors")
    encoder = network.network.encoder.state_dict()
    assert f"{len(encoder)} of {len(encoder)} tensors" in network.origin
    values = list(state.values())
    for key, tensor in encoder.items():
        assert any(tensor.shape == other.shape and torch.equal(tensor, other) for other in values), key


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"does not fit.*set model\.backbone to the encoder"):
        make(weights=tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("resnt50", "no encoder 'resnt50' (did you mean 'resnet50'?)"),
        ("tf_efficientnet_lite0", "timm's encoder of that name is tu-tf_efficientnet_lite0"),
        ("tu-tf_efficientnet_lit0", "did you mean 'tu-tf_efficientnet_lite0'?"),
        ("tu-test_vit", "DeepLabV3Plus around tu-test_vit: "),
        ("tu-resnet18", "give a file as model.weights=PATH"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_told_in_one_line(
    backbone: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        make(backbone=backbone, weights="hub")
    assert message in str(caught.value)


def test_without_the_library_its_installation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=r"pip install .*\[ms\]"):
        make()


@pytest.mark.parametrize(
    ("backbone", "name", "message"),
    [
        ("resnet18", "decoder_chanels", r"takes no such argument \(did you mean 'decoder_channels'\?\); it takes"),
        (
            "tu-test_resnet",
            "decoder_chanels",
            r"argument 'decoder_chanels' \(did you mean 'decoder_channels'\?\); take",
        ),
        ("resnet18", "classes", r"^model\.arguments\.classes: cosa_fast sets this one itself; remove it$"),
    ],
)
def test_an_argument_that_nothing_takes_is_refused(backbone: str, name: str, message: str) -> None:
    config = ModelConfig(architecture="DeepLabV3Plus", backbone=backbone, weights="none", arguments={name: 8})
    with pytest.raises(UserError, match=message):
        build_standalone(config, CLASSES)
