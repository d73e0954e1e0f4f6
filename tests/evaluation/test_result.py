"""What an evaluation measured, as a table."""

import math
from pathlib import Path

import pytest
from evaluation_support import ColourNet, block_masks, evaluate, make_dataset

from cosa_fast.evaluation.result import CamScore, EvalResult, Score


def test_table_names_classes_and_both_kinds_of_segmentation(tmp_path: Path) -> None:
    result = evaluate(ColourNet(), make_dataset(tmp_path, block_masks()))
    lines = result.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:6] == ["IoU", "in", "%", "label-free", "label-aware", "best"]
    by_name = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert float(by_name["cat"][0]) == pytest.approx(result.label_free.iou[1], abs=0.006)
    assert float(by_name["mIoU"][1]) == pytest.approx(result.label_aware.miou, abs=0.006)
    assert result.cam.best_threshold != 0.5
    assert float(by_name["threshold"][2]) == pytest.approx(result.cam.best_threshold, abs=6e-4)
    assert float(by_name["threshold"][3]) == pytest.approx(0.3, abs=6e-4)


def score(miou: float) -> Score:
    return Score(miou, (miou,), None)


def result_of(cam: CamScore, cam_aux: CamScore | None = None) -> EvalResult:
    segmentation = score(40.0)
    return EvalResult(1, ("background", "cat"), (0,), segmentation, segmentation, cam, cam, cam_aux, None, 0.25)


def test_thresholds_are_told_by_what_they_cost_and_which_way_they_err() -> None:
    low = CamScore(score(52.5), 0.15, score(50.25), 0.4, 0.125)
    between = CamScore(score(48.0), 0.5, score(48.5), 0.52, 0.375)
    summary = result_of(low, between).summary()
    assert (summary["cam_threshold_loss"], summary["cam_aux_threshold_loss"]) == (2.25, -0.5)
    shares = ("foreground_share_cam", "foreground_share_cam_aux", "foreground_share_true")
    assert [summary[name] for name in shares] == [0.125, 0.375, 0.25]


def test_without_thresholds_the_truth_s_share_stands_alone() -> None:
    summary = result_of(CamScore(score(50.0), 0.3, None, None, None)).summary()
    assert {name for name in summary if "loss" in name or "share" in name} == {"foreground_share_true"}
    assert not any(math.isnan(value) for value in summary.values())
