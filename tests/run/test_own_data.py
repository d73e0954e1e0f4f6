"""Whole tiny runs on data as people have it, as a user would start them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosa_fast import api, predict
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.run.training import train

MakeConfig = Callable[..., Config]

# About the network, the schedule and the evaluation; nothing about data.
SMALL = (
    "model.backbone=vit_tiny_patch16_224",
    "model.weights=none",
    "model.arguments={img_size: 448, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.aux_layer=-2",
    "model.decoder_width=8",
    "teacher.scales=[0.25]",
    "optim.iterations=2",
    "optim.cotrain_after=1",
    "optim.warmup=1",
    "optim.batch_size=1",
    "eval.scales=[0.25]",
    "eval.flip=false",
    "eval.cam_step=0.5",
    "eval.limit=2",
    "run.device=cpu",
    "run.threads=1",
)


@pytest.mark.parametrize(("recipe", "data"), [("voc.yaml", "voc_animals"), ("coco.yaml", "tiny_coco")])
def test_real_sets_train_with_their_root_alone(
    recipe: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(os.environ.get("COSA_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data" / data
    if not root.is_dir():
        pytest.skip(f"real data not found: {root} (set COSA_SHARED)")
    summary = train(load_config(recipe, [f"data.root={root}", *SMALL, f"run.output={tmp_path}"]))
    assert 0 <= summary.results["an"].summary()["seg_label_free"] <= 100
    said = capsys.readouterr().out
    assert ("train2014: " in said and "train2017 is taken" in said) is (recipe == "coco.yaml")


@pytest.fixture
def many_classes(tmp_path: Path) -> Path:
    """A COCO folder of 300 categories; each of its eight images shows one of the last, and class 255 in its corner."""
    root, count = tmp_path / "many", 300
    images, annotations = [], []
    for k in range(8):
        for split in ("train", "val"):
            (root / split).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (30 * k, 90, 20)).save(root / split / f"{k}.jpg")
        images.append({"id": k, "file_name": f"{k}.jpg", "height": 64, "width": 64})
        for category, left in ((count - k, 20), (255, 0)):
            box = [left, left, left + 20, left, left + 20, left + 20, left, left + 20]
            annotations.append({"image_id": k, "category_id": category, "segmentation": [box], "area": 400})
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, count + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_more_than_254_classes_train_are_evaluated_and_predicted(
    many_classes: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    pytest.importorskip("pycocotools")
    options = ("data.format=coco", f"data.root={many_classes}", "optim.iterations=2", "optim.cotrain_after=0")
    summary = train(make_config(*options))
    result: Any = summary.results["an"]
    rows = {name: row["cam_best"] for name, row in result.per_class().items()}
    assert len(rows) == 301
    assert {name for name, iou in rows.items() if iou == iou} >= {"class 255", "class 300", "class 293"}
    assert rows["class 1"] != rows["class 1"], "a class on no image has no IoU"
    assert api.evaluate(summary.folder.best)["an"].summary() == result.summary()

    image = many_classes / "val" / "0.jpg"
    (mask,) = api.segment(summary.folder.best, [image])
    assert (mask.dtype, mask.shape) == (np.int16, (64, 64))
    assert predict.main([str(summary.folder.best), str(image), "-o", str(tmp_path / "out")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "0.png")), mask)


def test_the_oracle_reads_wide_masks(many_classes: Path, make_config: MakeConfig) -> None:
    pytest.importorskip("pycocotools")
    options = ("data.format=coco", f"data.root={many_classes}", "optim.iterations=1", "optim.cotrain_after=0")
    assert train(make_config(*options, "loss.guidance=truth")).iteration == 1
