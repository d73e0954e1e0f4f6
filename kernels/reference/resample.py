"""Bilinear resampling with align_corners=False: whole maps, and the few pixels that a reduction reads.

Output position i of an axis resampled from n to m elements lies at source coordinate (i + 1/2)·n/m − 1/2, cut off at 0
and n − 1. Written over the common denominator 2m it is an integer, so taps and weights here are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Taps(NamedTuple):
    """The two source elements that each of m outputs mixes: (1 − weight)·x[first] + weight·x[second]."""

    first: Tensor  # (m,) int64
    second: Tensor  # (m,) int64; equals first where weight is 0, so that every tap counts
    weight: Tensor  # (m,) float64 in [0, 1)


def bilinear_taps(source: int, target: int, device: torch.device) -> Taps:
    """Taps along one axis of `source` elements resampled to `target` elements."""
    numerator = (2 * torch.arange(target, device=device) + 1) * source - target
    numerator = numerator.clamp(0, 2 * target * (source - 1))
    first = numerator // (2 * target)
    remainder = numerator % (2 * target)
    return Taps(first, first + (remainder > 0), remainder.double() / (2 * target))


def interpolation_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """(target, source) float64 matrix U: U @ x resamples x along one axis."""
    taps = bilinear_taps(source, target, device)
    rows = torch.arange(target, device=device)
    matrix = torch.zeros(target, source, dtype=torch.float64, device=device)
    matrix[rows, taps.first] += 1 - taps.weight
    matrix[rows, taps.second] += taps.weight
    return matrix


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of the last two axes of (N, K, h, w) maps, no antialias."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class ReducedPixels:
    """The pixels of an (H, W) grid that its bilinear reduction to (h, w) reads: 2h rows × 2w columns of them.

    Only these need evaluating when nothing but the reduced map is wanted; for a 16× reduction they are 4 of every 256.
    """

    def __init__(self, size: tuple[int, int], grid: tuple[int, int], device: torch.device) -> None:
        self.size, self.grid, self.device = size, grid, device
        self.taps = [bilinear_taps(full, reduced, device) for full, reduced in zip(size, grid, strict=True)]
        self.positions = [torch.stack((taps.first, taps.second), 1).flatten() for taps in self.taps]

    def evaluate(self, maps: Tensor) -> Tensor:
        """(B, K, a, b) maps, upsampled to (H, W) but evaluated at the read pixels alone: (B, K, 2h, 2w)."""
        rows, columns = (
            interpolation_matrix(source, full, self.device)[positions].to(maps.dtype)
            for source, full, positions in zip(maps.shape[-2:], self.size, self.positions, strict=True)
        )
        return rows @ maps @ columns.T

    def reduce(self, values: Tensor) -> Tensor:
        """(B, K, 2h, 2w) values at the read pixels, brought to the (h, w) grid."""
        row_weights, column_weights = (
            torch.stack((1 - taps.weight, taps.weight), 1).to(values.dtype) for taps in self.taps
        )
        cells = values.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, K, h, 2, w, 2)
        return torch.einsum("bkyuxv,yu,xv->bkyx", cells, row_weights, column_weights)

    def all_true(self, mask: Tensor) -> Tensor:
        """(B, H, W) bool → (B, h, w) bool: every pixel that the cell reads is True."""
        read = mask[:, self.positions[0]][:, :, self.positions[1]]
        return read.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).all(4).all(2)
