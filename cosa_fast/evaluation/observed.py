"""What a report draws of an evaluation besides its scores: counts over the set, for curves and matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosa_fast.data_pipeline.batch import ignored
from cosa_fast.evaluation.metrics import ConfusionMatrix, iou_from_counts

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


class Observer:
    """Gathers `Observed` while an evaluation goes through its images. images: the indices of all ranks' images."""

    def __init__(self, images: Sequence[int], device: torch.device) -> None:
        self._images = tuple(images)
        self._position = {index: position for position, index in enumerate(images)}
        self._quality = torch.zeros(len(images), dtype=torch.float64, device=device)
        self._confidence = {
            name: torch.zeros(BINS, len(OUTCOMES), dtype=torch.int64, device=device) for name in ("cam", "cam_aux")
        }

    @contextmanager
    def image(self, index: int, matrix: ConfusionMatrix) -> Iterator[None]:
        """Inside, the image of that index is counted into `matrix`."""
        before = matrix.counts.clone()
        yield
        self._quality[self._position[index]] = 100 * iou_from_counts(matrix.counts - before).nanmean()

    def add_map(self, name: str, confidence: Tensor, category: Tensor, truth: Tensor) -> None:
        """One image's ν and ŷ of a map ("cam", "cam_aux"), and its truth, a mask: (H, W) each."""
        outcome = torch.full_like(category, OUTCOMES.index("wrong"))
        outcome[category == truth] = OUTCOMES.index("right")
        outcome[truth == 0] = OUTCOMES.index("background")
        outcome[ignored(truth)] = OUTCOMES.index("unknown")
        index = (confidence * BINS).long().clamp(0, BINS - 1) * len(OUTCOMES) + outcome
        counts = self._confidence[name]
        counts += torch.bincount(index[category > 0], minlength=counts.numel()).view_as(counts)

    def tensors(self) -> list[Tensor]:
        """All that is counted, to be summed over ranks."""
        return [self._quality, *self._confidence.values()]

    def observed(
        self,
        confusion: Tensor,
        thresholds: Sequence[float] = (),
        sweep: dict[str, list[float]] | None = None,
    ) -> Observed:
        """Everything, after `tensors` have been summed over the ranks."""
        confidence = {name: counts.cpu() for name, counts in self._confidence.items() if bool(counts.any())}
        quality = tuple(self._quality.tolist())
        return Observed(confusion.cpu(), confidence, tuple(thresholds), sweep or {}, self._images, quality)
