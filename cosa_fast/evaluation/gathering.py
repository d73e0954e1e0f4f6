"""Figures that an evaluation gathers where it computes, and that come to the host once, at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cosa_fast.distributed import Ranks

# On a GPU pixels of one class would wait for each other at one counter: each counter has so many copies, as long as all
# of them stay below this number.
COPIES = 64
COUNTERS = 1 << 21


def must_wait(device: torch.device) -> bool:
    """Whether the host would have to wait to read a value from there."""
    return device.type != "cpu"


class Counted(Protocol):
    """Something with counts, int64 or float64, that are additive over ranks."""

    counts: Tensor


def tally(index: Tensor, bins: int) -> Tensor:
    """How often each of 0..bins-1 occurs in each row of index (N, M) int64: (N, bins) int64. Nothing is read back."""
    rows, length = index.shape
    copies = max(1, min(COPIES, COUNTERS // (rows * bins))) if must_wait(index.device) else 1
    if copies > 1:
        index = index + torch.arange(length, device=index.device) % copies * bins
    if rows > 1:
        index = index + torch.arange(rows, device=index.device)[:, None] * (copies * bins)
    index = index.flatten()
    counts = torch.zeros(rows * copies * bins, dtype=torch.int64, device=index.device)
    counts.scatter_add_(0, index, torch.ones_like(index))
    return counts.view(rows, copies, bins).sum(1)


class PerImage:
    """A row of figures for each of the images of an evaluation; zeros for those of other ranks.

    counts: (images, width) float64, once `gather` was called.
    """

    counts: Tensor

    def __init__(self, images: int, width: int, device: torch.device) -> None:
        self._shape, self._device = (images, width), device
        self._positions: list[int] = []
        self._rows: list[Tensor] = []

    def add(self, positions: Sequence[int], rows: Tensor) -> None:
        """rows: (N, width), of the images at `positions`."""
        self._positions += positions
        self._rows.append(rows)

    def gather(self) -> PerImage:
        """To be called once, after the last image."""
        self.counts = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        if self._rows:
            positions = torch.tensor(self._positions, device=self._device)
            self.counts[positions] = torch.cat(self._rows).to(self._device, torch.float64)
        return self


def finish(counted: Sequence[Counted], ranks: Ranks) -> None:
    """Sum the counts over the ranks and bring them to the host, all at once."""
    for each in counted:
        ranks.sum_(each.counts)
    whole = torch.cat([each.counts.flatten().view(torch.int64) for each in counted]).cpu()
    for each, part in zip(counted, whole.split([each.counts.numel() for each in counted]), strict=True):
        each.counts = part.view(each.counts.dtype).view(each.counts.shape)
