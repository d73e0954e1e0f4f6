"""Segmentation metrics from integer counts over a whole set; never averages of per-image figures.

IoU of class k = TP_k / (TP_k + FP_k + FN_k). A class that occurs neither in the truth nor in the prediction has no IoU:
NaN, left out of every mean. A class that is only predicted has IoU 0 and counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cosa_fast.data_pipeline.batch import ignored
from cosa_fast.evaluation.gathering import tally


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

        ValueError for other values (where the truth is not 255) or shapes; the host waits to know.
        """
        _check_shapes(prediction, truth)
        known = ~ignored(truth)
        _check_range("prediction", prediction[known], self.num_classes)
        _check_range("truth", truth[known], self.num_classes)
        self.add(prediction[None], truth[None])

    def add(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """As `update` for a batch, (N, ...), whose values are known to be right. Returns the counts of each image,
        (N, K, K) int64."""
        pairs = self.num_classes**2
        index = torch.where(ignored(truth), pairs, truth.long() * self.num_classes + prediction)
        counts = tally(index.flatten(1), pairs + 1)[:, :-1].unflatten(1, self.counts.shape)
        self.counts += counts.sum(0)
        return counts

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
    """IoU of the CPL (category where confidence ≥ threshold, else background) at many thresholds, in one pass.

    counts: (3, T + 1, K) int64, per b = the number of thresholds ≤ confidence and per class: pixels of that category
    and truth; of that category; of that truth. An IoU needs no more, and their number grows with K alone.
    thresholds: the grid. own: one more threshold, which `best` does not choose.
    """

    def __init__(
        self,
        num_classes: int,
        thresholds: Sequence[float],
        device: torch.device | str = "cpu",
        own: float | None = None,
    ) -> None:
        if not thresholds or any(low >= high for low, high in itertools.pairwise(thresholds)):
            raise ValueError(f"thresholds must be strictly increasing and not empty, got {list(thresholds)}")
        self.num_classes = num_classes
        self.grid = tuple(thresholds)
        wanted = np.array([*thresholds, *([] if own is None else [own])], np.float32)
        every, places = np.unique(wanted, return_inverse=True)
        self._places, self._own = places.tolist()[: len(thresholds)], None if own is None else int(places[-1])
        self.thresholds = torch.tensor(every.tolist(), dtype=torch.float32, device=device)
        self.counts = torch.zeros((3, len(every) + 1, num_classes), dtype=torch.int64, device=device)

    def update(self, confidence: Tensor, category: Tensor, truth: Tensor) -> None:
        """Add one map or batch, all of one shape.

        confidence: float; category: integer in 0..K-1; truth: integer in {0..K-1, 255}.
        ValueError for other values (where the truth is not 255) or shapes; the host waits to know.
        """
        _check_shapes(confidence, category, truth)
        known = ~ignored(truth)
        _check_range("category", category[known], self.num_classes)
        _check_range("truth", truth[known], self.num_classes)
        self.add(confidence, category, truth)

    def add(self, confidence: Tensor, category: Tensor, truth: Tensor) -> None:
        """As `update`, for values that are known to be right."""
        outside, unknown = self.counts[0].numel(), ignored(truth)
        bins = torch.bucketize(confidence.float(), self.thresholds, right=True) * self.num_classes
        by_category = torch.where(unknown, outside, bins + category)
        by_truth = torch.where(unknown, outside, bins + truth.long())
        both = torch.where(category == truth, by_category, outside)
        index = torch.stack([each.flatten() for each in (both, by_category, by_truth)])
        self.counts += tally(index, outside + 1)[:, :-1].view_as(self.counts)

    def iou(self) -> Tensor:
        """(T, K) float64 in [0, 1] at each threshold of the grid; NaN for a class that occurs in neither."""
        return self._iou()[self._places]

    def own_iou(self) -> Tensor:
        """(K,) at the threshold `own`."""
        assert self._own is not None
        return self._iou()[self._own]

    def own_share(self) -> float:
        """Of all pixels counted, the share in [0, 1] that is foreground at the threshold `own`; NaN where none was
        counted."""
        assert self._own is not None
        total = int(self.counts[1].sum())
        return int(self.counts[1, self._own + 1 :, 1:].sum()) / total if total else math.nan

    def best(self, indices: Sequence[int] | None = None) -> BestThreshold:
        """The grid threshold with the highest mean IoU over `indices` (the lowest such threshold where several tie)."""
        iou = self.iou()
        miou = mean_iou(iou, indices)
        best = int(miou.nan_to_num(nan=-1.0).argmax())
        return BestThreshold(float(miou[best]), self.grid[best], iou[best])

    def _iou(self) -> Tensor:
        below = self.counts.cumsum(1)[:, :-1]
        hits, predicted, _ = self.counts.sum(1, keepdim=True) - below
        hits[:, 0] += below[2, :, 0]
        predicted[:, 0] += below[1].sum(-1)
        union = predicted + self.counts[2].sum(0) - hits
        values = hits.double() / union.clamp(min=1)
        return torch.where(union > 0, values, torch.full_like(values, math.nan))


def average_precision(scores: Tensor, present: Tensor) -> Tensor:
    """Σ (R_n − R_{n−1})·P_n per class, over the distinct scores n from the highest down: the area under the
    precision–recall steps.

    scores: (N, C) float; present: (N, C) bool. Returns (C,) float64 in [0, 1], NaN for a class on no image.
    """
    values = []
    for score, truth in zip(scores.double().T.cpu(), present.T.cpu(), strict=True):
        order = score.argsort(descending=True, stable=True)
        score, hits = score[order], truth[order].double().cumsum(0)
        last = torch.cat([score[1:] != score[:-1], torch.ones(1, dtype=torch.bool)])
        hits, seen = hits[last], (torch.arange(len(score))[last] + 1).double()
        gained = torch.diff(hits, prepend=torch.zeros(1, dtype=torch.float64))
        values.append((gained * hits / seen).sum() / hits[-1])  # 0/0: NaN
    return torch.stack(values)


def threshold_grid(step: float) -> list[float]:
    """step, 2·step, ... below 1. ValueError unless 0 < step < 1."""
    if not 0.0 < step < 1.0:
        raise ValueError(f"step must lie between 0 and 1, got {step}")
    count = math.ceil(1.0 / step - 1e-6) - 1
    return [round(step * (index + 1), 10) for index in range(count)]


def _check_shapes(*maps: Tensor) -> None:
    if len({each.shape for each in maps}) > 1:
        raise ValueError(f"the maps must share one shape, got {[tuple(each.shape) for each in maps]}")


def _check_range(name: str, values: Tensor, num_classes: int) -> None:
    """Another class would be counted as another pair of classes."""
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= num_classes):
        raise ValueError(f"{name} must lie in 0..{num_classes - 1}, got {int(values.min())}..{int(values.max())}")
