"""What one training step receives."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from cosa_fast.data_pipeline.datasets.masks import IGNORE_INDEX, WIDE_IGNORE_INDEX


def ignored(truth: Tensor) -> Tensor:
    """Where a mask says nothing, bool of its shape: 255; in int16, the type of masks of more than 254 classes, -1."""
    return truth == (WIDE_IGNORE_INDEX if truth.dtype == torch.int16 else IGNORE_INDEX)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; to a GPU out of page-locked memory, so that the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which batches are copied to a device."""
    return torch.cuda.Stream(device)


@dataclass
class Batch:
    """Two pixel-aligned views of B images with their image-level labels (METHOD section 2).

    weak, strong: (B, 3, H, W) float32, normalised; exactly 0 in the padding.
    labels: (B, C) float32 multi-hot. valid: (B, H, W) bool, True on real (non-padding) pixels. ids: B image ids.
    truth: (B, H, W) uint8 in {0..C, 255} (int16, see `ignored`) for studies that need it, None in ordinary training.
    """

    weak: Tensor
    strong: Tensor
    labels: Tensor
    valid: Tensor
    ids: list[str]
    truth: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`. From the host to a GPU it is copied beside what the GPU computes, which waits for
        it only with what it is given from now on."""
        device = torch.device(device)
        if device.type != "cuda" or self.weak.is_cuda:
            return self.map(lambda tensor: tensor.to(device, non_blocking=True))
        copies, current = _copy_stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(copies):
            moved = self.map(lambda tensor: tensor.to(device, non_blocking=True))
        current.wait_stream(copies)
        for tensor in (moved.weak, moved.strong, moved.labels, moved.valid, moved.truth):
            if tensor is not None:
                tensor.record_stream(current)  # its memory is of the other stream, and must not go while this one reads
        return moved

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies without making the host wait."""
        return self.map(Tensor.pin_memory)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to every tensor."""
        return Batch(
            weak=function(self.weak),
            strong=function(self.strong),
            labels=function(self.labels),
            valid=function(self.valid),
            ids=self.ids,
            truth=None if self.truth is None else function(self.truth),
        )

    def split(self, parts: int) -> list["Batch"]:
        """The batch in equal parts, which share its memory. ValueError if its images cannot be shared out evenly."""
        count = len(self.weak) // parts
        if count * parts != len(self.weak):
            raise ValueError(f"parts: got {parts} for {len(self.weak)} images, want a divisor")

        def cut(start: int) -> "Batch":
            part = self.map(lambda tensor: tensor[start : start + count])
            part.ids = self.ids[start : start + count]
            return part

        return [cut(start) for start in range(0, len(self.weak), count)] if parts > 1 else [self]

    def copy_(self, other: "Batch") -> None:
        """Take over another batch's tensors, in place."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        for own, value in pairs:
            if isinstance(own, Tensor):
                own.copy_(value, non_blocking=True)
