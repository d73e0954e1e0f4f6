"""Bilinear upsampling of a band of rows at a time, and the box of the pixels that count.

Upsampling is linear along each axis: a product with the matrix of `interpolation_matrix`. Along the columns it is done
for all rows of a map, of which there are few; along the rows for a band of pixels, which mixes few rows of the map.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..reference.resample import interpolation_matrix

CACHE_ELEMENTS = 2**19  # 2 MiB of float32: what the second-level caches of two cores hold

Box = tuple[slice, slice]


def rows_at_once(elements: int) -> int:
    """How many rows of so many elements to work on, that they stay in the cache."""
    return max(CACHE_ELEMENTS // max(elements, 1), 1)


@lru_cache(maxsize=32)
def _matrix(source: int, target: int, dtype: torch.dtype) -> Tensor:
    """`interpolation_matrix`; made anew for every image it would take as long as a small image itself."""
    return interpolation_matrix(source, target, torch.device("cpu")).to(dtype)


class Band(NamedTuple):
    """Some rows of a box of pixels, counted from its first; the rows of the map that they mix; the shares of these
    (pixels, rows of the map)."""

    pixels: slice
    sources: slice
    shares: Tensor


class Upsampling:
    """K maps (K, h, w) upsampled to (H, W) within a box of its pixels: band by band, and the way back."""

    def __init__(self, maps: Tensor, size: tuple[int, int], box: Box) -> None:
        axes = zip(maps.shape[1:], size, box, strict=True)
        self._down, self._across = (_matrix(source, target, maps.dtype)[part] for source, target, part in axes)
        self._wide = maps.transpose(0, 1) @ self._across.T  # (h, K, columns of the box)
        self._height = rows_at_once(self._wide[0].numel())

    def bands(self) -> Iterator[tuple[Band, Tensor]]:
        """Every band with its values (rows, K, columns), which the caller may overwrite."""
        start = 0
        for shares in self._down.split(self._height):
            mixed = shares.any(0).nonzero()
            sources = slice(int(mixed[0]), int(mixed[-1]) + 1)
            band = Band(slice(start, start + len(shares)), sources, shares[:, sources])
            yield band, (band.shares @ self._wide[sources].flatten(1)).view(-1, *self._wide.shape[1:])
            start += len(shares)

    def gather(self, gradients: Iterator[tuple[Band, Tensor]]) -> Tensor:
        """The gradient of the maps (K, h, w) from those of the values, of every band."""
        wide = torch.zeros_like(self._wide)
        for band, gradient in gradients:
            wide[band.sources].flatten(1).addmm_(band.shares.T, gradient.flatten(1))
        return (wide @ self._across).transpose(0, 1)


def box_of(mask: Tensor | None, size: tuple[int, int]) -> Box | None:
    """The rows and the columns from the first to the last True of (H, W), None where there is none; without a mask all
    of them."""
    if mask is None:
        return slice(0, size[0]), slice(0, size[1])
    array = mask.numpy()  # torch takes a hundred times as long for such a reduction
    rows, columns = (np.flatnonzero(array.any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
