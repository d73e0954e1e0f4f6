"""What a report draws of an evaluation besides its scores: counts over the set, for curves and matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosa_fast.data_pipeline.batch import ignored
from cosa_fast.evaluation.gathering import Counted, PerImage, tally
from cosa_fast.evaluation.metrics import iou_from_counts

# Of a confidence in [0, 1]. ξ and perplexity follow from the confidence alone, so these bins are kept, not theirs.
BINS = 256
# What a pixel's category ŷ is against the truth; unknown: there is none (255, or a set without masks).
OUTCOMES = ("right", "background", "wrong", "unknown")


@dataclass(frozen=True)
class Observed:
    """Counts of one network's evaluation.

    confusion: (K, K) int64, [truth, label-free segmentation]; without masks [CPL, segmentation]. confidence: by map
    ("cam", "cam_aux"), (BINS, 4) int64: pixels of images with a class, by their confidence ν and what ŷ is (OUTCOMES).
    sweep: by map, mIoU in percent of the CPL at each of `thresholds`; none without masks. images: the indices in the
    set that were evaluated; quality: for each the mIoU in percent of its own segmentation, over the classes in truth or
    segmentation (without masks: of its agreement with the CPL); NaN where nothing counts.
    """

    confusion: Tensor
    confidence: dict[str, Tensor]
    thresholds: tuple[float, ...]
    sweep: dict[str, list[float]]
    images: tuple[int, ...]
    quality: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        return {
            "confusion": self.confusion.tolist(),
            "confidence": {name: counts.tolist() for name, counts in self.confidence.items()},
            "thresholds": list(self.thresholds),
            "sweep": self.sweep,
        }


@dataclass
class _Confidences:
    """counts: (BINS, OUTCOMES) int64."""

    counts: Tensor


class Observer:
    """Gathers `Observed` while an evaluation goes through its images. images: the indices of all ranks' images."""

    def __init__(self, images: Sequence[int], device: torch.device) -> None:
        self._images = tuple(images)
        self._quality = PerImage(len(images), 1, device)
        self._confidence = {
            name: _Confidences(torch.zeros(BINS, len(OUTCOMES), dtype=torch.int64, device=device))
            for name in ("cam", "cam_aux")
        }

    def add_quality(self, positions: Sequence[int], counts: Tensor) -> None:
        """(N, K, K) confusions of the images at `positions` of those evaluated, one each."""
        self._quality.add(positions, 100 * iou_from_counts(counts).nanmean(-1, keepdim=True))

    def add_map(self, name: str, confidence: Tensor, category: Tensor, truth: Tensor) -> None:
        """ν and ŷ of a map ("cam", "cam_aux") of some images, and their truths, masks: (N, H, W) each."""
        right, background, wrong, unknown = map(OUTCOMES.index, ("right", "background", "wrong", "unknown"))
        outcome = torch.where(category == truth, right, wrong)
        outcome = torch.where(truth == 0, background, outcome)
        outcome = torch.where(ignored(truth), unknown, outcome)
        index = (confidence * BINS).long().clamp(0, BINS - 1) * len(OUTCOMES) + outcome
        counts = self._confidence[name].counts
        index = torch.where(category > 0, index, counts.numel())  # of an image without a class
        counts += tally(index.flatten()[None], counts.numel() + 1)[0, :-1].view_as(counts)

    def counted(self) -> list[Counted]:
        """All that is counted, after the last image."""
        return [self._quality.gather(), *self._confidence.values()]

    def observed(
        self,
        confusion: Tensor,
        thresholds: Sequence[float] = (),
        sweep: dict[str, list[float]] | None = None,
    ) -> Observed:
        """Everything, after what is `counted` has been summed over the ranks."""
        confidence = {name: each.counts for name, each in self._confidence.items() if bool(each.counts.any())}
        quality = tuple(self._quality.counts[:, 0].tolist())
        return Observed(confusion, confidence, tuple(thresholds), sweep or {}, self._images, quality)
