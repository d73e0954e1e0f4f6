"""Multi-scale, flipped CAMs to confidence and category (METHOD section 3) on a CPU: image by image, its present classes
and the box of its valid pixels alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.cams import MIN_MAX_EPSILON, category_type
from ..reference.common import real
from .bands import Box, Upsampling, box_of


@torch.no_grad()
def fuse_cams(
    cams: Sequence[Tensor], image_labels: Tensor, size: tuple[int, int], valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As reference.fuse_cams: ν and ŷ (B, H, W)."""
    batch, classes = image_labels.shape
    confidence = torch.zeros((batch, *size), dtype=real(cams[0][:0]).dtype)
    category = torch.zeros((batch, *size), dtype=category_type(classes))
    for image, present in enumerate(image_labels > 0):
        own = present.nonzero()[:, 0]
        box = box_of(None if valid is None else valid[image], size)
        if not len(own) or box is None:
            continue
        pairs = [(cam[image, own], cam[batch + image, own]) for cam in cams]
        inside = None if valid is None or valid[image][box].all() else valid[image][box]
        maps = _normalised(_fused(pairs, size, box), inside)
        confidence[image][box], category[image][box] = _largest(maps, own)
        if inside is not None:
            for output in (confidence, category):
                output[image][box].masked_fill_(~inside, 0)
    return confidence, category


def _fused(pairs: Sequence[tuple[Tensor, Tensor]], size: tuple[int, int], box: Box) -> Tensor:
    """Σ_s relu(max(up(CAM_s), flipped back up(CAM_s of the mirrored image))) in the box: (rows, P, columns)."""
    scales = [Upsampling(torch.cat((real(plain), real(mirrored).flip(-1))), size, box) for plain, mirrored in pairs]
    rows, columns = box
    maps = torch.zeros(
        rows.stop - rows.start, len(pairs[0][0]), columns.stop - columns.start, dtype=real(pairs[0][0]).dtype
    )
    for pieces in zip(*(scale.bands() for scale in scales), strict=True):
        for band, values in pieces:
            plain, mirrored = values.chunk(2, 1)
            maps[band.pixels] += torch.maximum(plain, mirrored).clamp_(min=0)
    return maps


def _normalised(maps: Tensor, inside: Tensor | None) -> Tensor:
    """(x − min) / (max − min + 1e-5) of (rows, P, columns), in place; the extremes are those inside."""
    low, high = maps, maps
    if inside is not None:
        outside = ~inside[:, None]
        low, high = maps.masked_fill(outside, torch.inf), maps.masked_fill(outside, -torch.inf)
    low, high = low.amin((0, 2), keepdim=True), high.amax((0, 2), keepdim=True)
    return maps.sub_(low).div_(high - low + MIN_MAX_EPSILON)


def _largest(maps: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of (rows, P, columns) at every pixel, and the number of its class; of equals the first."""
    best, category = maps[:, 0], torch.full_like(maps[:, 0], int(classes[0]) + 1, dtype=torch.int16)
    for slot, number in enumerate((classes[1:] + 1).tolist(), 1):
        category.masked_fill_(maps[:, slot] > best, number)
        best = torch.maximum(best, maps[:, slot])
    return best, category
