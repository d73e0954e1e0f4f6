"""Files of other programs: what they tell of a network, and that it evaluates and predicts as one trained here."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from evaluation_support import CLASSES, MEAN, STD, block_masks, picture, save_networks, write_voc
from official_files import official_state, save_official
from PIL import Image

from cosa_fast import evaluate, predict
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config, DataConfig, EvalConfig, ModelConfig
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import load_networks
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet

MODEL = ModelConfig(
    backbone="vit_tiny_patch16_224",
    weights="none",
    arguments={"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 2},
    aux_layer=-2,
    decoder_width=16,
    position_resampling="plain",
)


def make(classes: int = len(CLASSES), **settings: object) -> CoSANet:
    torch.manual_seed(0)
    network = build_model(replace(MODEL, **settings), classes)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in network.head_parameters():
            parameter.normal_(std=0.3)
    return network


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A configuration that names what the tensors of MODEL do not tell."""
    values = {
        "data": {"root": str(write_voc(tmp_path / "set", block_masks())), "mean": list(MEAN), "std": list(STD)},
        "model": {"backbone": MODEL.backbone, "arguments": MODEL.arguments},
        "eval": {"scales": [1.0, 0.5], "coexistence": []},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"base": "voc_published.yaml", **values}))
    return tmp_path / "own.yaml"


def test_a_file_of_the_release_scores_as_the_same_network_saved_here(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = make()
    official = save_official(tmp_path / "best_seg.pth", network, aux_layer=-2)
    assert evaluate.main([str(official), "--config", str(settings), "--json", str(tmp_path / "official.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"59 of 59 tensors (whole network) from {official}; dropped head.weight, head.bias; AN of"
    )
    assert printed.count("at iteration 20000") == 1, "one network, one table"
    own = replace(load_config(settings), model=replace(MODEL, aux_layer=-2))
    saved = save_networks(tmp_path / "own.pt", network, network, own)
    assert evaluate.main([str(saved), "--json", str(tmp_path / "own.json")]) == 0
    records = [json.loads((tmp_path / name).read_text()) for name in ("official.json", "own.json")]
    for name in ("student", "teacher"):
        assert records[0][name] == records[1][name]
    capsys.readouterr()
    assert evaluate.main([str(official), "--config", str(settings), "--crf", "ours", "--limit", "1"]) == 0
    assert capsys.readouterr().out.count("with CRF, 1 of ") == 1
    with pytest.raises(UserError, match=r"^--network an: has no effect, there is one network alone in .*best_seg"):
        evaluate.main([str(official), "--config", str(settings), "--network", "an"])


def test_a_file_of_the_release_predicts_from_the_command_line(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = make()
    official = save_official(tmp_path / "best_seg.pth", network, aux_layer=-2)
    own = Config(data=DataConfig(mean=MEAN, std=STD), model=MODEL, eval=EvalConfig(scales=(1.0, 0.5)))
    saved = save_networks(tmp_path / "own.pt", network, network, own)
    image = picture(tmp_path / "a.png")
    assert predict.main([str(official), str(image), "-o", str(tmp_path / "1"), "--config", str(settings)]) == 0
    assert "class 1 " in capsys.readouterr().out
    assert predict.main([str(saved), str(image), "-o", str(tmp_path / "2")]) == 0
    with Image.open(tmp_path / "1/masks/a.png") as first, Image.open(tmp_path / "2/masks/a.png") as second:
        assert len(np.unique(first)) > 1
        assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, ("vit_tiny_patch16_224", {})),
        ({"img_size": 448}, ("vit_tiny_patch16_224", {"img_size": 448})),
        ({"patch_size": 8, "img_size": 64}, ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8})),
    ],
)
def test_the_tensors_tell_architecture_and_classes(arguments: dict, told: tuple, tmp_path: Path) -> None:
    network = make(20, arguments=arguments, aux_layer=-4, decoder_width=24)
    found = load_networks(save_official(tmp_path / "w.pth", network, aux_layer=-4, crop_size=320))
    assert (found.config.model.backbone, found.config.model.arguments) == told
    assert (found.config.model.aux_layer, found.config.model.decoder_width) == (-4, 24)
    assert (found.config.model.position_resampling, found.config.data.crop_size) == ("plain", 320)
    assert (found.classes[0], len(found.classes), found.iteration) == ("aeroplane", 20, 20000)
    assert found.on is found.an
    assert found.imported is not None
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for mine, its in zip(network.eval()(images), found.an(images), strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=0)


def test_plain_state_dicts_are_taken_with_what_the_command_line_adds(tmp_path: Path) -> None:
    network = make(20, arguments={}, aux_layer=None)
    torch.save({f"module.{key}": value for key, value in official_state(network).items()}, tmp_path / "w.pth")
    found = load_networks(tmp_path / "w.pth")
    assert (found.config.model.aux_layer, found.iteration, found.an.classifier_aux) == (None, 0, None)
    torch.save(official_state(make(20, arguments={}, aux_layer=-4)), tmp_path / "w.pth")
    assert load_networks(tmp_path / "w.pth").config.model.aux_layer == -3, "nothing tells it"
    assert load_networks(tmp_path / "w.pth", overrides=["model.aux_layer=-4"]).config.model.aux_layer == -4


def test_own_names_keep_the_way_of_positions_that_is_configured(tmp_path: Path) -> None:
    torch.save(make(20, arguments={}).state_dict(), tmp_path / "w.pth")
    for way in ("plain", "antialiased"):
        found = load_networks(tmp_path / "w.pth", overrides=[f"model.position_resampling={way}"])
        assert found.config.model.position_resampling == way


def test_files_of_related_methods_load(tmp_path: Path) -> None:
    state = official_state(make(20, arguments={}))
    toco = state | {f"{head}.last_layer.weight_v": torch.ones(2, 2) for head in ("proj_head", "proj_head_t")}
    dupl = {f"branch{branch}.{key}": value for branch in (1, 2) for key, value in state.items()}
    for name, content in {"toco": toco, "dupl": dupl}.items():
        torch.save({f"module.{key}": value for key, value in content.items()}, tmp_path / f"{name}.pth")
    assert "left out proj_head, proj_head_t" in str(load_networks(tmp_path / "toco.pth").imported)
    assert "took branch1, left out branch2" in str(load_networks(tmp_path / "dupl.pth").imported)


def test_a_file_of_seco_has_its_own_segmentation_head(tmp_path: Path) -> None:
    network = make(80, arguments={}, decoder="aspp")
    beside = {f"encoder_k.{key}": torch.ones(1) for key in ("pos_embed", "norm.weight")} | {"queue": torch.ones(2, 2)}
    torch.save(
        {f"module.{key}": value for key, value in (official_state(network) | beside).items()}, tmp_path / "s.pth"
    )
    found = load_networks(tmp_path / "s.pth")
    assert found.config.model.decoder == "aspp"
    assert found.classes[:2] + found.classes[-1:] == ("person", "bicycle", "toothbrush")
    assert "left out encoder_k, queue" in str(found.imported)
    with torch.no_grad():
        features = torch.randn(1, 192, 6, 6)
        torch.testing.assert_close(found.an.decoder(features), network.decoder(features), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (make().encoder.backbone.state_dict(), [], "holds no segmentation network"),
        (official_state(make()), [], "no plain ViT; name it: --config"),
        (official_state(make()), ["model.backbone=resnet18"], "does not fit the model"),
        ({"epoch": 3}, [], "holds no state dict"),
    ],
    ids=["backbone", "unknown", "other", "nothing"],
)
def test_what_cannot_be_used_is_told_in_one_short_line(
    content: object, arguments: list[str], message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main([str(tmp_path / "w.pth"), *arguments])
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "w.pth") in str(caught.value)


def test_a_configuration_is_for_files_that_have_none(tmp_path: Path, settings: Path) -> None:
    saved = save_networks(tmp_path / "own.pt", make(), make(), Config(model=MODEL))
    with pytest.raises(UserError, match=r"--config .*own\.yaml: .* has a configuration of its own"):
        load_networks(saved, config=str(settings))
