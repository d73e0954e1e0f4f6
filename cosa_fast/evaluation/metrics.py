"""Segmentation metrics from integer counts over a whole set; never averages of per-image figures.

IoU of class k = TP_k / (TP_k + FP_k + FN_k). A class that occurs neither in the truth nor in the prediction has no IoU:
NaN, left out of every mean. A class that is only predicted has IoU 0 and counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = 255


def iou_from_counts(counts: Tensor) -> Tensor:
    """Per-class IoU.

    counts: (..., K, K) integer, indexed [truth, prediction].
    Returns (..., K) float64 in [0, 1], NaN for a class that occurs in neither.
    """
    hits = counts.diagonal(dim1=-2, dim2=-1).double()
    union = counts.sum(-1).double() + counts.sum(-2).double() - hits
    return torch.where(union > 0, hits / union.clamp(min=1), torch.full_like(hits, math.nan))


def mean_iou(iou: Tensor, indices: Sequence[int] | None = None) -> Tensor:
    """Mean of iou (..., K) over the classes `indices` (None: all), NaN left out: (...), NaN where nothing is left."""
    chosen = iou if indices is None else iou[..., list(indices)]
    return chosen.nanmean(-1)


class ConfusionMatrix:
    """One confusion matrix over everything it was shown; pixels with truth 255 are ignored.

    counts: (K, K) int64 on `device`, indexed [truth, prediction].
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add one map or batch. prediction: integer in 0..K-1; truth: the same shape, integer in {0..K-1, 255}.

        ValueError for other values (where the truth is not 255) or shapes.
        """
        prediction, truth = _valid_pixels((prediction, truth), truth)
        _check_range("prediction", prediction, self.num_classes)
        _check_range("truth", truth, self.num_classes)
        index = truth * self.num_classes + prediction
        self.counts += torch.bincount(index, minlength=self.num_classes**2).view_as(self.counts)

    def iou(self) -> Tensor:
        """(K,) float64 in [0, 1]; NaN for a class that occurs neither in the truth nor in the prediction."""
        return iou_from_counts(self.counts)

    def miou(self, indices: Sequence[int] | None = None) -> float:
        """Mean IoU over `indices` (None: all K), classes without an IoU left out; NaN when none is left."""
        return float(mean_iou(self.iou(), indices))

    def foreground_shares(self) -> tuple[float, float]:
        """Of all pixels counted, the shares in [0, 1] that the truth and the prediction call foreground (any class but
        0); NaN where none was counted."""
        total = int(self.counts.sum())
        if total == 0:
            return math.nan, math.nan
        return int(self.counts[1:].sum()) / total, int(self.counts[:, 1:].sum()) / total


class BestThreshold(NamedTuple):
    """miou: in [0, 1]; threshold: the confidence at which it is reached; iou: (K,) float64 there."""

    miou: float
    threshold: float
    iou: Tensor


class ThresholdSweep:
    """Confusion matrices of the CPL (category where confidence ≥ threshold, else background) at many thresholds.

    One pass: counts[b, category, truth], b = the number of grid thresholds ≤ confidence, hold all of the matrices.
    """

    def __init__(self, num_classes: int, thresholds: Sequence[float], device: torch.device | str = "cpu") -> None:
        if not thresholds or any(low >= high for low, high in itertools.pairwise(thresholds)):
            raise ValueError(f"thresholds must be strictly increasing and not empty, got {list(thresholds)}")
        self.num_classes = num_classes
        self.grid = tuple(thresholds)
        self.thresholds = torch.tensor(thresholds, dtype=torch.float32, device=device)
        shape = (len(thresholds) + 1, num_classes, num_classes)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(self, confidence: Tensor, category: Tensor, truth: Tensor) -> None:
        """Add one map or batch, all of one shape.

        confidence: float; category: integer in 0..K-1; truth: integer in {0..K-1, 255}.
        ValueError for other values (where the truth is not 255) or shapes.
        """
        confidence, category, truth = _valid_pixels((confidence, category, truth), truth)
        _check_range("category", category, self.num_classes)
        _check_range("truth", truth, self.num_classes)
        bins = torch.bucketize(confidence.float(), self.thresholds, right=True)
        index = (bins * self.num_classes + category) * self.num_classes + truth
        self.counts += torch.bincount(index, minlength=self.counts.numel()).view_as(self.counts)

    def confusions(self) -> Tensor:
        """(T, K, K) int64, indexed [threshold, truth, prediction]."""
        below = self.counts.cumsum(0)
        confusion = (below[-1:] - below[:-1]).transpose(1, 2).contiguous()
        confusion[:, :, 0] += below[:-1].sum(1)
        return confusion

    def best(self, indices: Sequence[int] | None = None) -> BestThreshold:
        """The grid threshold with the highest mean IoU over `indices` (the lowest such threshold where several tie)."""
        iou = iou_from_counts(self.confusions())
        miou = mean_iou(iou, indices)
        best = int(miou.nan_to_num(nan=-1.0).argmax())
        return BestThreshold(float(miou[best]), self.grid[best], iou[best])


def threshold_grid(step: float) -> list[float]:
    """step, 2·step, ... below 1. ValueError unless 0 < step < 1."""
    if not 0.0 < step < 1.0:
        raise ValueError(f"step must lie between 0 and 1, got {step}")
    count = math.ceil(1.0 / step - 1e-6) - 1
    return [round(step * (index + 1), 10) for index in range(count)]


def _valid_pixels(maps: tuple[Tensor, ...], truth: Tensor) -> tuple[Tensor, ...]:
    """The pixels whose truth is not ignored, flattened; integers become int64, so that indices can be multiplied."""
    if any(each.shape != truth.shape for each in maps):
        raise ValueError(f"the maps must share one shape, got {[tuple(each.shape) for each in maps]}")
    keep = truth != IGNORE_INDEX
    return tuple(each[keep] if each.is_floating_point() else each[keep].long() for each in maps)


def _check_range(name: str, values: Tensor, num_classes: int) -> None:
    """bincount would file an out-of-range class under another pair of classes."""
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= num_classes):
        raise ValueError(f"{name} must lie in 0..{num_classes - 1}, got {int(values.min())}..{int(values.max())}")
