"""What one training step receives."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """Two pixel-aligned views of B images with their image-level labels (METHOD section 2).

    weak, strong: (B, 3, H, W) float32, normalised; exactly 0 in the padding.
    labels: (B, C) float32 multi-hot. valid: (B, H, W) bool, True on real (non-padding) pixels. ids: B image ids.
    truth: (B, H, W) uint8 in {0..C, 255} for studies that need it, None in ordinary training.
    """

    weak: Tensor
    strong: Tensor
    labels: Tensor
    valid: Tensor
    ids: list[str]
    truth: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return Batch(
            weak=self.weak.to(device, non_blocking=True),
            strong=self.strong.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            ids=self.ids,
            truth=None if self.truth is None else self.truth.to(device, non_blocking=True),
        )
