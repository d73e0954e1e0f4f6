"""Metrics against per-pixel loops and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from cosa_fast.evaluation.metrics import ConfusionMatrix, ThresholdSweep, iou_from_counts, mean_iou, threshold_grid

IGNORE = 255


def random_maps(num_classes: int, shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, num_classes, shape, generator=generator, dtype=torch.uint8)
    truth = torch.randint(0, num_classes, shape, generator=generator, dtype=torch.uint8)
    truth[torch.rand(shape, generator=generator) < 0.2] = IGNORE
    return prediction, truth


def naive_counts(prediction: torch.Tensor, truth: torch.Tensor, num_classes: int) -> np.ndarray:
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    for p, t in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if t != IGNORE:
            counts[t, p] += 1
    return counts


@pytest.mark.parametrize("num_classes", [2, 21, 81])
def test_counts_equal_the_per_pixel_loop_and_sklearn(num_classes: int) -> None:
    matrix = ConfusionMatrix(num_classes)
    pairs = [random_maps(num_classes, (13, 17), seed) for seed in range(3)]
    for prediction, truth in pairs:
        matrix.update(prediction, truth)
    expected = sum(naive_counts(p, t, num_classes) for p, t in pairs)
    assert np.array_equal(matrix.counts.numpy(), expected)
    truth = torch.cat([t.flatten() for _, t in pairs]).numpy()
    prediction = torch.cat([p.flatten() for p, _ in pairs]).numpy()
    keep = truth != IGNORE
    by_sklearn = confusion_matrix(truth[keep], prediction[keep], labels=range(num_classes))
    assert np.array_equal(matrix.counts.numpy(), by_sklearn)


def test_iou_equals_set_arithmetic() -> None:
    prediction, truth = random_maps(5, (40, 30))
    matrix = ConfusionMatrix(5)
    matrix.update(prediction, truth)
    keep = truth != IGNORE
    for index, iou in enumerate(matrix.iou().tolist()):
        inside, wanted = (prediction == index) & keep, (truth == index) & keep
        assert iou == pytest.approx(int((inside & wanted).sum()) / int((inside | wanted).sum()), abs=1e-12)


def test_foreground_shares_are_of_the_pixels_with_a_truth() -> None:
    matrix = ConfusionMatrix(3)
    assert all(map(math.isnan, matrix.foreground_shares()))
    truth = torch.tensor([0, 0, 0, 0, 1, 2, 2, 0, IGNORE, IGNORE])
    prediction = torch.tensor([0, 1, 2, 0, 1, 1, 0, 0, 1, 0])
    matrix.update(prediction, truth)
    assert matrix.foreground_shares() == (3 / 8, 4 / 8)


def test_miou_is_over_the_set_not_over_images() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([1]), torch.tensor([1]))
    matrix.update(torch.tensor([0, 0, 0]), torch.tensor([1, 1, 0]))
    assert matrix.iou().tolist() == pytest.approx([1 / 3, 1 / 3])


def test_class_that_occurs_nowhere_has_no_iou_and_does_not_lower_the_mean() -> None:
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 1]))
    iou = matrix.iou().tolist()
    assert math.isnan(iou[2])
    assert iou[3] == 0.0, "a class that is only predicted is an error, not an absence"
    assert matrix.miou() == pytest.approx((1.0 + 0.5 + 0.0) / 3)


def test_miou_over_chosen_classes() -> None:
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 1]))
    assert matrix.miou([0, 1]) == pytest.approx(0.75)
    assert math.isnan(matrix.miou([2]))


def test_ignored_pixels_change_nothing() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 1, 2]), torch.full((3,), IGNORE))
    assert matrix.counts.sum() == 0
    assert math.isnan(matrix.miou())


@pytest.mark.parametrize(("prediction", "truth"), [([3], [0]), ([0], [3]), ([-1], [0]), ([0, 1], [0])])
def test_wrong_classes_or_shapes_are_refused(prediction: list[int], truth: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lie in 0\.\.2|share one shape"):
        ConfusionMatrix(3).update(torch.tensor(prediction), torch.tensor(truth))


def test_sweep_equals_thresholding_at_every_grid_value() -> None:
    grid = threshold_grid(0.1)
    sweep = ThresholdSweep(6, grid)
    direct = [ConfusionMatrix(6) for _ in grid]
    for seed in range(2):
        category, truth = random_maps(6, (31, 23), seed)
        confidence = torch.rand(31, 23, generator=torch.Generator().manual_seed(seed))
        confidence[0, : len(grid)] = torch.tensor(grid)  # equality counts as foreground
        confidence[1, :2] = torch.tensor([0.0, 1.0])
        sweep.update(confidence, category, truth)
        for threshold, matrix in zip(grid, direct, strict=True):
            above = confidence >= torch.tensor(threshold)
            matrix.update(torch.where(above, category, torch.zeros_like(category)), truth)
    assert torch.equal(sweep.iou(), torch.stack([matrix.iou() for matrix in direct]))
    best = sweep.best([0, 1, 2])
    values = [matrix.miou([0, 1, 2]) for matrix in direct]
    assert best.miou == pytest.approx(max(values))
    assert best.threshold == pytest.approx(grid[int(np.argmax(values))])
    assert torch.equal(best.iou, direct[int(np.argmax(values))].iou())


def test_sweep_finds_the_separating_threshold() -> None:
    sweep = ThresholdSweep(2, threshold_grid(0.05))
    truth = torch.tensor([0, 0, 1, 1])
    sweep.update(torch.tensor([0.1, 0.42, 0.48, 0.9]), torch.ones(4, dtype=torch.uint8), truth)
    assert sweep.best().threshold == pytest.approx(0.45)
    assert sweep.best().miou == 1.0


def test_sweep_that_saw_nothing_has_no_miou() -> None:
    assert math.isnan(ThresholdSweep(3, [0.5]).best().miou)


@pytest.mark.parametrize("thresholds", [[], [0.5, 0.5], [0.6, 0.2]])
def test_sweep_refuses_unordered_thresholds(thresholds: list[float]) -> None:
    with pytest.raises(ValueError, match="strictly increasing"):
        ThresholdSweep(3, thresholds)


@pytest.mark.parametrize(("step", "count", "last"), [(0.05, 19, 0.95), (0.1, 9, 0.9), (0.3, 3, 0.9), (0.5, 1, 0.5)])
def test_threshold_grid_stays_inside_the_open_interval(step: float, count: int, last: float) -> None:
    grid = threshold_grid(step)
    assert len(grid) == count
    assert grid[0] == step
    assert grid[-1] == pytest.approx(last)


@pytest.mark.parametrize("step", [0.0, 1.0, -0.1])
def test_threshold_grid_refuses_other_steps(step: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        threshold_grid(step)


def test_batched_counts_give_batched_iou() -> None:
    counts = torch.tensor([[[2, 0], [0, 2]], [[1, 1], [1, 1]]])
    assert mean_iou(iou_from_counts(counts)).tolist() == pytest.approx([1.0, 1 / 3])
