"""What several definitions share: the type of the arithmetic, and the present classes of a batch.

Present classes are handled in slots: P is the largest number of classes that one image has, and absent classes cost
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def real(tensor: Tensor) -> Tensor:
    """The tensor in the type of the arithmetic: float64 as it is, everything else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def present_slots(image_labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C) labels → each image's present classes, ascending: index 0..C−1 (B, P) int64, filled (B, P) bool."""
    present = image_labels > 0
    slots = max(int(present.sum(1).max()), 1)
    classes = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    return classes, present.gather(1, classes)
