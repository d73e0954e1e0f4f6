"""What the classifier says of whole images, beside the classes that they show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosa_fast.evaluation.gathering import Counted, PerImage
from cosa_fast.evaluation.metrics import average_precision


def _of_each(logits: Sequence[Tensor], images: int) -> Tensor:
    """(scales and flips, N, C) of one (N or 2N, C) per scale, N = `images`."""
    return torch.cat([each.unflatten(0, (-1, images)) for each in logits])


def predicted_labels(logits: Sequence[Tensor], images: int) -> Tensor:
    """(N, C) bool: the classes that the classifier finds, with a mean logit above 0 (σ > ½). logits: one (N or 2N, C)
    per scale, N = `images`."""
    return _of_each(logits, images).mean(0) > 0


class ImageLabels:
    """Scores of the classifier, and true labels, of each of `images` images."""

    def __init__(self, images: int, classes: int, device: torch.device) -> None:
        self._scores, self._present = (PerImage(images, classes, device) for _ in range(2))

    def add(self, positions: Sequence[int], logits: Sequence[Tensor], present: Tensor) -> None:
        """The N images at `positions` of those evaluated. logits: one (N or 2N, C) per scale; present: (N, C) bool."""
        self._scores.add(positions, _of_each(logits, len(positions)).double().mean(0))
        self._present.add(positions, present)

    def counted(self) -> list[Counted]:
        """All that is counted, after the last image."""
        return [self._scores.gather(), self._present.gather()]

    def average_precision(self) -> tuple[float, ...]:
        """In percent of each class, NaN for one on no image."""
        return tuple((100 * average_precision(self._scores.counts, self._present.counts > 0)).tolist())

    def images_per_class(self) -> list[int]:
        """How many images show each class."""
        return self._present.counts.sum(0).long().tolist()
