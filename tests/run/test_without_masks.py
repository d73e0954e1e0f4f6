"""A whole run on a folder of images with a CSV and without one mask."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cosa_fast import api, evaluate, prepare
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.synthetic import generate
from cosa_fast.evaluation.label_only import LabelResult
from cosa_fast.run.training import train

MakeConfig = Callable[..., Config]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of five suffixes and a spreadsheet's CSV."""
    generate(tmp_path / "generated", train=12, val=1, size=64, seed=1)
    labels = json.loads((tmp_path / "generated/labels.json").read_text())
    root = tmp_path / "mine"
    root.mkdir()
    rows = ["\ufeffPhoto;On it"]
    for number, path in enumerate(sorted((tmp_path / "generated/JPEGImages").glob("train*"))):
        name = path.stem + (".jpg", ".JPG", ".jpeg", ".png", ".webp")[number % 5]
        Image.open(path).save(root / name)
        rows.append(f"{name};{', '.join(labels[path.stem])}")
    (root / "labels.csv").write_bytes("\r\n".join(rows).encode())
    return root


def test_a_folder_without_masks_trains_resumes_and_is_evaluated(
    folder: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (folder / "labels.csv").read_bytes()
    assert prepare.main(["--format", "folder", "--root", str(folder), "--workers", "0"]) == 0
    assert (folder / "labels.csv").read_bytes() == given
    assert not (folder / "labels.json").exists()
    assert "train with: python -m cosa_fast.train folder.yaml data.root=" in capsys.readouterr().out
    assert len((folder / "classes.txt").read_text().split()) == 5

    overrides = ("data.format=folder", f"data.root={folder}", "data.val_split=null", "eval.every=2")
    config = make_config(*overrides, "optim.iterations=2", "optim.cotrain_after=1")
    summary = train(config)
    out = capsys.readouterr().out
    assert "no masks, so no mIoU" in out
    assert "semicolon-separated, image names in column 'Photo', classes in 'On it'" in out
    held = (summary.directory / "held_out.txt").read_text().split()
    assert held
    results = json.loads((summary.directory / "results.json").read_text())
    assert set(results["teacher"]) == {
        "image_ap",
        "seg_cam_agreement",
        "foreground_share_seg",
        "foreground_share_cam",
        "cam_threshold",
    }
    assert (summary.directory / "gallery.png").is_file()
    assert summary.folder.best.is_file(), "the last is the best"

    summary = train(make_config(*overrides, "optim.iterations=4", "optim.cotrain_after=1"), resume="auto")
    assert (summary.iteration, (summary.directory / "held_out.txt").read_text().split()) == (4, held)
    result = api.evaluate(summary.folder.best)["an"]
    assert isinstance(result, LabelResult)
    assert result.summary() == summary.results["an"].summary()
    assert evaluate.main([str(summary.folder.best), "--network", "an"]) == 0
    assert f"{len(held)} image held out of the training" in capsys.readouterr().out


def test_masks_of_some_validation_images_are_used(
    folder: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "masks").mkdir()
    for path in sorted((folder.parent / "generated/SegmentationClass").glob("train*"))[:5]:
        (folder / "masks" / path.name).write_bytes(path.read_bytes())
    (folder / "train.txt").write_text("".join(f"train_{k:05d}\n" for k in range(3, 12)))
    (folder / "val.txt").write_text("train_00000\ntrain_00001\ntrain_00009\n")
    overrides = ("data.format=folder", f"data.root={folder}", "optim.iterations=1", "optim.cotrain_after=0")
    summary = train(make_config(*overrides))
    assert "val: masks of 2 of 3 images; only these are evaluated" in capsys.readouterr().out
    assert summary.results["an"].images == 2
    assert "seg_label_free" in summary.results["an"].summary()
