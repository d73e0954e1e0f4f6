"""A whole run of CoSA-MS on exported pseudo-labels, with the folder, resume and evaluation of every other run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast import evaluate, export, predict
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError
from cosa_fast.evaluation.evaluator import LabelResult
from cosa_fast.evaluation.networks import load, load_networks
from cosa_fast.run.data import open_datasets
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.training import train
from cosa_fast.train import main

pytest.importorskip("segmentation_models_pytorch")
MakeConfig = Callable[..., Config]


def test_ms_yaml_leaves_what_every_run_leaves(
    data_root: Path, cpl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["model.backbone=tu-test_resnet", "model.weights=none", "data.crop_size=64", "data.workers=0"]
    small += ["data.pipeline=torch", "optim.iterations=2", "optim.batch_size=2", "eval.every=1", "eval.scales=[1.0]"]
    small += ["eval.coexistence=[]", "run.device=cpu", "run.threads=1"]
    places = [f"data.root={data_root}", "data.train_split=train", f"data.pseudo_labels={cpl}"]
    places += [f"run.output={tmp_path / 'runs'}", "run.name=ms"]
    assert main(["ms.yaml", *small, *places]) == 0
    out = " ".join(capsys.readouterr().out.split())  # the opening is wrapped
    for said in (
        f"train: pseudo-labels of 8 images from {cpl}",
        "DeepLabV3Plus around tu-test_resnet",
        "cross entropy with the pseudo-labels",
        "iteration 2 DeepLabV3Plus, 2 images: seg label-free",
        "DeepLabV3Plus at iteration 2, 2 images",
    ):
        assert said in out
    for word in (" ON ", " AN", "CAM", "warning"):
        assert word not in out, word
    folder = RunFolder(tmp_path / "runs/ms")
    results = json.loads(folder.results.read_text())
    assert results.keys() == {"iteration", "evaluated_on", "teacher"}
    assert not [key for key in results["teacher"] if "cam" in key]
    assert "cannot be drawn" not in folder.report.read_text()
    assert folder.gallery.exists()

    assert load_networks(folder.best).single
    figures = tmp_path / "figures.json"
    assert evaluate.main([str(folder.best), "--json", str(figures)]) == 0
    assert capsys.readouterr().out.count("DeepLabV3Plus at iteration") == 1
    found = json.loads(figures.read_text())["teacher"]["summary"]["seg_label_free"]
    assert found == pytest.approx(load(folder.best)["chosen"]["value"])

    image = str(data_root / "JPEGImages/val_00000.jpg")
    assert export.main([str(folder.best), "--images", image, "-o", str(tmp_path / "exported")]) == 0
    assert "a DeepLabV3Plus, which learned from" in (tmp_path / "exported/README.md").read_text()
    assert str(cpl) not in (tmp_path / "exported/model.safetensors").read_bytes().decode("latin-1")
    for network, output in ((folder.best, "out"), (tmp_path / "exported/model.safetensors", "again")):
        assert predict.main([str(network), image, "-o", str(tmp_path / output)]) == 0
    masks = [np.array(Image.open(tmp_path / output / "masks/val_00000.png")) for output in ("out", "again")]
    assert np.array_equal(*masks)
    with pytest.raises(UserError, match="a DeepLabV3Plus has no CAM; take --what segmentation"):
        predict.main([str(folder.best), image, "--what", "cpl", "-o", str(tmp_path / "out")])
    for door, options in ((evaluate, []), (export, []), (predict, [image, "-o", str(tmp_path / "out")])):
        with pytest.raises(UserError, match=r"^--network on: has no effect, there is one network alone in "):
            door.main([str(folder.best), *options, "--network", "on"])


def test_a_resumed_run_ends_as_an_unbroken_one(make_standalone: MakeConfig, same: Callable[..., bool]) -> None:
    straight = train(make_standalone("run.name=straight", "run.checkpoint_every=2"))
    halves = make_standalone("run.name=halves", "run.checkpoint_every=2")
    half = straight.folder.checkpoint(2)
    resumed = train(halves, resume=str(half))
    left, right = (load(each.folder.checkpoint(4)) for each in (straight, resumed))
    for part in ("student", "teacher", "optimizer", "best"):
        assert same(left[part], right[part]), part


def test_a_set_without_masks_is_evaluated_by_its_labels(
    make_standalone: MakeConfig, data_root: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(data_root, tmp_path / "bare")
    shutil.rmtree(root / "SegmentationClass")
    result = train(make_standalone(f"data.root={root}", "optim.iterations=2")).results["an"]
    assert isinstance(result, LabelResult)
    assert set(result.summary()) == {"image_ap", "foreground_share_seg"}
    assert "CAM" not in result.table() + result.legend()


def drop(cpl: Path) -> None:
    (cpl / "masks/train_00003.png").unlink()


def shrink(cpl: Path) -> None:
    Image.new("P", (32, 64)).save(cpl / "masks/train_00003.png")


def misnumber(cpl: Path) -> None:
    Image.new("L", (64, 64), 6).save(cpl / "masks/train_00003.png")


def colour(cpl: Path) -> None:
    Image.new("RGB", (64, 64)).save(cpl / "masks/train_00003.png")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (drop, r"1 of 8 training images have none, first train_00003; write them with: python -m cosa_fast\.predict"),
        (shrink, "the mask is 32x64 but its image .* is 64x64"),
        (misnumber, r"value 6 is neither a class \(0\.\.5\) nor 255"),
        (colour, "shows colours"),
        (shutil.rmtree, "no such folder; write them with: .* --split train --what cpl"),
    ],
)
def test_pseudo_labels_that_cannot_be_used_are_told_before_the_training(
    harm: Callable[[Path], None], message: str, make_standalone: MakeConfig, cpl: Path
) -> None:
    harm(cpl)
    with pytest.raises(UserError, match=message):
        open_datasets(make_standalone())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.pseudo_labels=null"], "learns from pseudo-labels; give data.pseudo_labels=FOLDER"),
        (
            ["model.architecture=CoSA"],
            "CoSA makes its own; set model.architecture to DeepLabV3Plus, Segformer or UPerNet",
        ),
        (["model.architecture=DeepLab"], "must be one of CoSA, DeepLabV3Plus"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    overrides: list[str], message: str, make_standalone: MakeConfig
) -> None:
    with pytest.raises(UserError, match=message):
        open_datasets(make_standalone(*overrides))


def test_other_pseudo_labels_are_noticed_when_a_run_goes_on(
    make_standalone: MakeConfig, cpl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_standalone("optim.iterations=2"))
    Image.new("L", (64, 64), 1).save(cpl / "masks/train_00000.png")
    train(make_standalone("optim.iterations=3"), resume="auto")
    assert "the training labels have changed" in capsys.readouterr().out
