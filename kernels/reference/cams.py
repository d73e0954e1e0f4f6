"""Multi-scale, flipped CAMs to confidence and category (METHOD section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..validation import MAX_UINT8_CLASSES
from .common import present_slots, real
from .resample import resize

MIN_MAX_EPSILON = 1e-5  # of the min–max normalisation of CAMs


def category_type(num_classes: int) -> torch.dtype:
    """uint8 while the ignore index 255 is free, otherwise int16."""
    return torch.uint8 if num_classes <= MAX_UINT8_CLASSES else torch.int16


@torch.no_grad()
def fuse_cams(
    cams: Sequence[Tensor], image_labels: Tensor, size: tuple[int, int], valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ν and ŷ of METHOD section 3: the largest of the present classes' maps M', and the class that it belongs to."""
    classes, filled = present_slots(image_labels)
    image, slot = filled.nonzero(as_tuple=True)
    maps = class_maps(cams, len(filled), image, classes[image, slot], size, valid)
    by_slot = maps.new_full((*filled.shape, *size), -1.0)
    by_slot[image, slot] = maps
    confidence, best = by_slot.max(dim=1)  # ties go to the lowest class
    category = classes.gather(1, best.flatten(1)).view_as(best) + 1
    empty = ~filled.any(1)[:, None, None]
    if valid is not None:
        empty = empty | ~valid
    return confidence.masked_fill(empty, 0), category.masked_fill(empty, 0).to(category_type(image_labels.shape[1]))


def class_maps(
    cams: Sequence[Tensor],
    images: int,
    image: Tensor,
    category: Tensor,
    size: tuple[int, int],
    valid: Tensor | None = None,
) -> Tensor:
    """M' of METHOD section 3 before its maximum over classes: flip-max, ReLU, sum over scales, then
    (x − min) / (max − min + 1e-5) with the extremes of each map.

    Args:
        cams: per scale (2·images, C, h_s, w_s) raw CAMs, the second half computed on the flipped images; or
            (images, C, h_s, w_s), without flips.
        images: how many there are.
        image, category: (P,) int64, the pairs of an image and a class, in 0..images−1 and 0..C−1, that are wanted.
        size: (H, W).
        valid: (images, H, W) bool: the pixels whose extremes count; None: all. Maps are computed on the others, too.

    Returns:
        (P, H, W) float32, or float64 for float64 CAMs; in [0, 1] at the valid pixels.
    """
    maps = real(cams[0]).new_zeros(len(image), *size)
    for cam in cams:
        rows = resize(real(cam[image, category])[:, None], size)
        if len(cam) > images:
            flipped = resize(real(cam[images + image, category]).flip(-1)[:, None], size)
            rows = torch.maximum(rows, flipped)
        maps += rows[:, 0].relu()
    low, high = maps, maps
    if valid is not None:
        outside = ~valid[image]
        low, high = maps.masked_fill(outside, torch.inf), maps.masked_fill(outside, -torch.inf)
    low, high = low.amin((1, 2), keepdim=True), high.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low + MIN_MAX_EPSILON)
