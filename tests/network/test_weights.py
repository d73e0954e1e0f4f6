"""Weights: every origin loads fully or is refused by name; nothing is loaded in part."""

import argparse
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from official_files import official_state
from safetensors.torch import save_file

from cosa_fast.config.schema import ModelConfig
from cosa_fast.errors import UserError
from cosa_fast.network import torchvision_compat  # noqa: F401
from cosa_fast.network.build import build_model
from cosa_fast.network.encoder import Encoder, create_backbone
from cosa_fast.network.model import CoSANet
from cosa_fast.network.weights import import_official, load_backbone, read_state

import timm  # isort: skip

SHARED = Path(os.environ.get("COSA_SHARED", Path(__file__).parents[3] / "shared"))
SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3}
CLASSES = 3


def make(weights="none", classes: int = CLASSES, **settings) -> CoSANet:
    settings = {"backbone": "test_vit", "decoder_width": 16} | settings
    return build_model(ModelConfig(weights=str(weights), **settings), classes)


def assert_same_state(left: torch.nn.Module, right: torch.nn.Module) -> None:
    torch.testing.assert_close(dict(left.state_dict()), dict(right.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("backbone", "file", "report"),
    [
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0.safetensors", "294 of 294 tensors"),
        ("deit_small_patch16_224", "deit_small_patch16_224_saliency_fp16.safetensors", "150 of 150 tensors"),
    ],
)
def test_real_weights_load_fully(backbone, file, report, caplog):
    path = SHARED / "weights" / file
    if not path.exists():
        pytest.skip(f"no {path}: set COSA_SHARED to the folder with the shared weights")
    with caplog.at_level("INFO", logger="cosa_fast.network.build"):
        model = make(path, backbone=backbone)
    assert report in caplog.messages[0]
    given, loaded = read_state(path), model.encoder.backbone.state_dict()
    assert loaded.keys() <= given.keys()
    assert all(torch.equal(loaded[key], given[key].to(loaded[key].dtype)) for key in loaded)
    assert all(value.dtype == torch.float32 for value in loaded.values() if value.is_floating_point())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_vit", {}),
        ("test_vit3", {}),
        ("deit_tiny_distilled_patch16_224", SMALL),
        ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 112}),
        ("vit_base_patch16_clip_224", SMALL),
        ("vit_small_patch16_dinov3", SMALL),
        ("eva02_tiny_patch14_224", SMALL),
        ("resnet18", {}),
        ("test_convnext", {}),
    ],
)
def test_timm_checkpoints_of_every_family_load_fully_without_their_head(name, arguments):
    torch.manual_seed(1)
    trained = timm.create_model(name, num_classes=7, **arguments)
    torch.manual_seed(2)
    encoder = Encoder(create_backbone(name, arguments), -3).eval()
    report = load_backbone(encoder, trained.state_dict(), source="file")
    assert "dropped" in report
    given = trained.state_dict()
    for key, value in encoder.backbone.state_dict().items():
        own_key = key if key in given else f"fc_{key}"
        assert torch.equal(value, given[own_key]), key


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_every_file_format_loads(tmp_path, suffix):
    donor = make()
    path = tmp_path / f"weights{suffix}"
    state = donor.encoder.backbone.state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    assert_same_state(make(path).encoder, donor.encoder)


@pytest.mark.parametrize("nesting", ["state_dict", "model", "teacher"])
@pytest.mark.parametrize(
    "prefix", ["module.", "backbone.", "encoder.", "module.encoder.", "_orig_mod.module.backbone."]
)
def test_nested_and_prefixed_checkpoints_load(tmp_path, nesting, prefix):
    donor = make()
    state = {prefix + key: value for key, value in donor.encoder.backbone.state_dict().items()}
    torch.save(
        {nesting: state, "epoch": 3, "args": argparse.Namespace(lr=0.1, output=Path("runs"))}, tmp_path / "w.pth"
    )
    assert_same_state(make(tmp_path / "w.pth").encoder, donor.encoder)


def test_half_precision_weights_are_upcast(tmp_path):
    donor = make()
    save_file(
        {key: value.half() for key, value in donor.encoder.backbone.state_dict().items()}, tmp_path / "w.safetensors"
    )
    loaded = make(tmp_path / "w.safetensors").encoder.backbone.state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    torch.testing.assert_close(dict(loaded), dict(donor.encoder.backbone.state_dict()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.backbone."])
def test_parts_beside_the_backbone_are_dropped_and_reported(prefix):
    encoder = make().encoder
    state = {prefix + key: value for key, value in encoder.backbone.state_dict().items()}
    beside = {"projector.weight": torch.zeros(2, 2), prefix.replace("backbone.", "neck.bias"): torch.zeros(2)}
    report = load_backbone(encoder, state | beside, source="file")
    assert "dropped neck, projector" in report


def test_position_embedding_of_another_grid_is_interpolated_and_reported():
    donor = make(arguments={"img_size": 224})
    encoder = make(arguments={"img_size": 96}).encoder
    report = load_backbone(encoder, donor.encoder.backbone.state_dict(), source="file")
    assert "resampled pos_embed 1x197x64 to 1x37x64" in report


def broken(change: str) -> dict[str, torch.Tensor]:
    state = make().encoder.backbone.state_dict()
    if change == "missing":
        del state["blocks.0.norm1.weight"], state["norm.bias"]
    elif change == "unexpected":
        state["blocks.9.norm1.weight"] = torch.zeros(64)
    elif change == "wrong shape":
        state["blocks.0.norm1.weight"] = torch.zeros(32)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"2 missing \(blocks.0.norm1.weight 64, norm.bias 64\)"),
        ("unexpected", r"1 unexpected \(blocks.9.norm1.weight 64\)"),
        ("wrong shape", r"1 wrong shape \(blocks.0.norm1.weight 32, not 64\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_nothing_is_loaded(change, message):
    encoder = make().encoder
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(UserError, match=f"w.pth: .*{message}.*set model.backbone"):
        load_backbone(encoder, broken(change), source="w.pth")
    torch.testing.assert_close(dict(encoder.state_dict()), before, rtol=0, atol=0)


def test_weights_of_another_family_are_refused():
    state = create_backbone("resnet18", {}).state_dict()
    with pytest.raises(UserError, match=r"w.pth: .*missing .*unexpected .*conv1.weight") as caught:
        load_backbone(make().encoder, state, source="w.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_unreadable_files_are_told_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(UserError, match=rf"{name}: cannot be read: it is .* or ") as caught:
        make(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_file_and_empty_checkpoint_are_told(tmp_path):
    with pytest.raises(UserError, match=r"no_such.pth: no such file; give hub, none"):
        make(tmp_path / "no_such.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match=r"empty.pth: holds no state dict"):
        make(tmp_path / "empty.pth")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_checkpoint_gives_back_the_same_network(prefix):
    donor, model = make(), make()
    state = {prefix + key: value for key, value in official_state(donor).items()}
    report = import_official({"model": state}, model)
    assert_same_state(model, donor)
    total = len(model.state_dict())
    assert f"{total} of {total} tensors (whole network)" in report
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(model.eval()(images), donor.eval()(images), rtol=0, atol=0)


def test_own_naming_of_the_whole_network_is_taken_as_well():
    donor, model = make(), make()
    import_official(donor.state_dict(), model)
    assert_same_state(model, donor)


def test_whole_network_file_as_model_weights_loads_heads_too(tmp_path, caplog):
    donor = make()
    torch.save({"student": make().state_dict(), "teacher": official_state(donor)}, tmp_path / "best.pth")
    with caplog.at_level("INFO", logger="cosa_fast.network.build"):
        model = make(tmp_path / "best.pth")
    assert_same_state(model, donor)
    assert "whole network" in caplog.messages[-1]


def test_official_checkpoint_with_another_grid_of_positions():
    model = make(arguments={"img_size": 96})
    assert "resampled pos_embed" in import_official(official_state(make(arguments={"img_size": 224})), model)


def test_official_checkpoint_without_use_for_its_auxiliary_head():
    donor, model = make(), make(aux_layer=None)
    assert "dropped aux_classifier" in import_official(official_state(donor), model)
    assert torch.equal(model.classifier.weight, donor.classifier.weight)


@pytest.mark.parametrize(
    ("donor", "message"),
    [
        ({"classes": CLASSES + 1}, "trained on 4 classes, the data set has 3"),
        ({"decoder_width": 24}, r"wrong shape \(decoder.conv6.weight 24x64x3x3, not 16x64x3x3.*model.decoder_width"),
        ({"aux_layer": None}, r"1 missing \(classifier_aux.weight"),
        ({"backbone": "test_vit2"}, "set model.backbone"),
    ],
)
def test_official_checkpoint_that_does_not_fit_is_refused_and_nothing_is_loaded(donor, message):
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        import_official(official_state(make(**donor)), model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_backbone_alone_is_no_official_checkpoint():
    with pytest.raises(UserError, match="holds no CoSA network"):
        import_official(make().encoder.backbone.state_dict(), make(), name="w.pth")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache, and a hub at an address where nobody answers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


@pytest.mark.usefixtures("hub")
def test_unreachable_hub_is_told_with_the_remedy_before_its_client_tries_again_and_again(monkeypatch):
    client = "cosa_fast.network.weights.create_backbone"
    monkeypatch.setattr(client, lambda *_, **__: pytest.fail("the hub's client was asked"))
    with pytest.raises(UserError, match=r"weights=hub: http://127.0.0.1:9 cannot be reached.*model.weights=PATH"):
        make("hub")


def test_cached_hub_weights_load_offline_and_a_changed_architecture_is_refused(hub, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    donor = timm.create_model("test_vit")
    folder = hub / f"models--{timm.get_pretrained_cfg('test_vit').hf_hub_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(donor.state_dict(), snapshot / "model.safetensors")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    with caplog.at_level("INFO", logger="cosa_fast.network.build"):
        backbone = make("hub").encoder.backbone
    assert "tensors from the hub; stride 16" in caplog.messages[-1]
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in backbone.state_dict().items())
    with pytest.raises(UserError, match=r"model.weights=hub: loading test_vit: .*Missing key"):
        make("hub", arguments={"depth": 7})
