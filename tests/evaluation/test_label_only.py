"""Evaluation without masks: figures that need no truth, and none that needs one."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_support import CLASSES, ColourNet, block_masks, evaluate, make_dataset

from cosa_fast.config.schema import EvalConfig, TeacherConfig
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import LabelTable
from cosa_fast.errors import UserError
from cosa_fast.evaluation.label_only import LabelResult
from cosa_fast.evaluation.metrics import average_precision


def without_masks(root: Path, labelled: bool = True, masks: Sequence[np.ndarray] = block_masks()) -> ImageDataset:
    whole = make_dataset(root, list(masks))
    present = np.array([[(mask == c + 1).any() for c in range(len(CLASSES))] for mask in masks], np.uint8)
    table = LabelTable(present, np.full(len(masks), labelled))
    return ImageDataset(CLASSES, whole.ids, [whole.image_path(k) for k in range(len(masks))], table)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_that_of_scikit_learn(ties: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(40, 5)).round(0 if ties else 8)
    present = generator.random((40, 5)) < np.array([0.5, 0.1, 0.9, 0.3, 0.0])
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(present)).numpy()
    wanted = [metrics.average_precision_score(present[:, c], scores[:, c]) for c in range(4)]
    assert np.allclose(found[:4], wanted, rtol=0, atol=1e-12)
    assert math.isnan(found[4]), "a class on no image has none"


def test_a_perfect_network_agrees_with_itself(tmp_path: Path) -> None:
    result = evaluate(ColourNet(), without_masks(tmp_path), thresholds=(0.5, 0.5))
    assert isinstance(result, LabelResult)
    assert (result.images, result.counts, result.threshold) == (3, (1, 1, 1), 0.5)
    assert result.image_ap == (100.0, 100.0, 100.0)
    assert result.summary()["seg_cam_agreement"] > 70
    assert 0.1 < result.foreground_seg < 0.5
    assert not [name for name in result.summary() if "miou" in name or "seg_label" in name or "true" in name]


def test_a_segmentation_that_confuses_classes_agrees_less_and_finds_them_worse(tmp_path: Path) -> None:
    dataset = without_masks(tmp_path)
    good, bad = (evaluate(ColourNet(confuse=pair), dataset) for pair in (None, (1, 2)))
    assert bad.summary()["seg_cam_agreement"] < good.summary()["seg_cam_agreement"] - 20
    assert bad.summary()["image_ap"] < good.summary()["image_ap"]


def test_the_table_leaves_out_absent_classes_and_counts_them(tmp_path: Path) -> None:
    lines = evaluate(ColourNet(), without_masks(tmp_path), limit=1).table().splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["background", "cat", "all"]
    assert "2 classes left out: on none of these images and in no segmentation" in lines[-2]
    assert lines[-1] == "evaluated: 1 of 3 images"


def test_the_mean_of_the_agreement_is_that_of_the_rows_above_it(tmp_path: Path) -> None:
    """Background's, and that of a class on no image which the segmentation shows."""
    result = evaluate(ColourNet(confuse=(1, 2)), without_masks(tmp_path), limit=1)
    lines = [line.split() for line in result.table().splitlines()]
    rows = lines[1 : [line[0] for line in lines].index("all")]
    values = [float(line[-1]) for line in rows if line[-1] != "-"]
    assert [line[0] for line in lines[1:4]] == ["background", "cat", "dog"]
    assert lines[3][1:3] == ["0", "-"]
    assert sum(values) / len(values) == pytest.approx(result.summary()["seg_cam_agreement"], abs=0.06)
    assert next(iter(result.per_class())) == "background"


def test_images_without_mask_and_label_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image label"):
        evaluate(ColourNet(), without_masks(tmp_path, labelled=False))


def test_images_of_one_size_go_through_the_network_together_with_the_same_result(tmp_path: Path) -> None:
    masks = [mask for _ in range(3) for mask in block_masks()]
    masks[3][:] = 0
    dataset = without_masks(tmp_path, masks=masks)
    results, calls = [], []
    for batch_size in (1, 2):
        network = ColourNet()
        options = EvalConfig(scales=(1.0,), flip=False, batch_size=batch_size)
        results.append(evaluate(network, dataset, eval=options, teacher=TeacherConfig(scales=(1.0,), flip=False)))
        calls.append([shape[0] for shape, _ in network.calls])
    assert results[0] == results[1]
    assert calls == [[1] * 9, [2, 1] * 3]
