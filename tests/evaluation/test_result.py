"""What an evaluation measured, as a table."""

import math
from pathlib import Path

import pytest
from evaluation_support import ColourNet, block_masks, evaluate, make_dataset

from cosa_fast.evaluation.comparison import comparison_legend
from cosa_fast.evaluation.label_only import LabelResult
from cosa_fast.evaluation.result import CamScore, EvalResult, Score


def test_table_names_classes_and_both_kinds_of_segmentation(tmp_path: Path) -> None:
    result = evaluate(ColourNet(), make_dataset(tmp_path, block_masks()))
    *lines, ap, last = result.table().splitlines()
    assert ap == f"image AP of the classifier: {result.mean_image_ap:.2f}"
    assert last == "evaluated: 3 images"
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["segmentation", "CAM", "CAM", "free", "CAM†", "ensemble"]
    assert lines[1].split()[:6] == ["IoU", "in", "%", "free", "aware", "best"]
    by_name = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert float(by_name["cat"][0]) == pytest.approx(result.label_free.iou[1], abs=0.006)
    assert float(by_name["mIoU"][1]) == pytest.approx(result.label_aware.miou, abs=0.006)
    assert result.cam.best_threshold != 0.5
    assert float(by_name["threshold"][2]) == pytest.approx(result.cam.best_threshold, abs=6e-4)
    assert float(by_name["threshold"][3]) == pytest.approx(0.3, abs=6e-4)


@pytest.mark.parametrize("thresholds", [(0.3, 0.5), (None, None)])
def test_table_and_legend_stay_within_a_terminal_whatever_the_classes_are_called(thresholds: tuple) -> None:
    names = ("background", "a" * 300, "north-american porcupine", "猫")
    one = Score(100.0, (100.0,) * 4, 100.0)
    cam = CamScore(one, 0.5, *((one, 0.5, 0.3) if thresholds[0] else (None, None, None)))
    table = EvalResult(1, names, (0, 1, 2, 3), one, one, cam, cam, cam, cam, 0.2)
    assert max(map(len, (table.table() + "\n" + table.legend()).splitlines())) <= 100
    assert "C-mIoU" in table.table()
    labels = LabelResult(1, names[1:], (50.0,) * 3, (1, 1, 0), (50.0,) * 4, 0.2, 0.3, 0.5)
    assert max(map(len, (labels.table() + "\n" + labels.legend()).splitlines())) <= 100


def test_classes_that_are_nowhere_are_left_out_and_counted() -> None:
    nowhere = Score(50.0, (90.0, math.nan, math.nan, 10.0), None)
    table = EvalResult(1, ("background", "cat", "dog", "horse"), (0, 1, 2, 3), nowhere, nowhere, *[
        CamScore(nowhere, 0.5, None, None, None)] * 2, None, None, 0.2).table()  # fmt: skip
    assert "cat" not in table
    assert "horse" in table
    assert table.splitlines()[-2] == "2 classes left out: neither in a mask nor in a prediction"


def test_every_class_of_a_mean_has_a_row() -> None:
    """Of C-mIoU too, whose classes need not be among those of mIoU."""
    one = Score(50.0, (90.0, 10.0, 33.0), 33.0)
    table = EvalResult(1, ("background", "cat", "dog"), (0, 1), one, one, None, None, None, None, 0.2, coexistence=(2,))
    rows = [line.split()[:2] for line in table.table().splitlines()]
    assert rows[-5:-2] == [["mIoU", "50.00"], ["dog", "33.00"], ["C-mIoU", "33.00"]]
    assert rows[3:5] == [["background", "90.00"], ["cat", "10.00"]]


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


def test_a_legend_explains_what_is_shown_and_each_word_once() -> None:
    one, nowhere = score(50.0), (math.nan,)
    cam = CamScore(one, 0.5, None, None, None)
    shown = EvalResult(1, ("background",), (0,), one, one, cam, cam, None, None, 0.2, image_ap=nowhere)
    assert "CAM: told them, too; CAM free: told nothing\n" in shown.legend()
    assert not any(word in shown.legend() for word in ("CAM†", "ensemble", "at ξ", "image AP"))
    alone = EvalResult(1, ("background", "cat"), (0, 1), one, one, None, None, None, None, 0.2, image_ap=(30.0,))
    rows = [("a ON", shown.summary()), ("b", alone.summary())]
    together = comparison_legend(rows, shown.words() | alone.words()).splitlines()
    assert [line.partition(":")[0] for line in together] == ["ON", "free", "CAM", "best", "image AP, no classifier"]
    assert "CAM free" not in "".join(together), "of which that table has no column"
