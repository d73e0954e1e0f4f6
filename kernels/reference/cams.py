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
    """ν and ŷ of METHOD section 3: flip-max, ReLU, sum over scales, min–max over valid pixels, max over classes."""
    classes, filled = present_slots(image_labels)
    image, slot = filled.nonzero(as_tuple=True)
    fused = _fuse_scales(cams, image, classes[image, slot], size)  # (pairs, H, W)
    inside = torch.ones(len(filled), *size, dtype=torch.bool, device=fused.device) if valid is None else valid
    scores = fused.new_full((*filled.shape, *size), -1.0)
    scores[image, slot] = _min_max(fused, inside[image])
    confidence, best = scores.max(dim=1)  # ties go to the lowest class
    category = classes.gather(1, best.flatten(1)).view_as(best) + 1
    empty = ~inside | ~filled.any(1)[:, None, None]
    return confidence.masked_fill(empty, 0), category.masked_fill(empty, 0).to(category_type(image_labels.shape[1]))


def _fuse_scales(cams: Sequence[Tensor], image: Tensor, category: Tensor, size: tuple[int, int]) -> Tensor:
    """Σ_s relu(max(CAM_s, flipped back CAM_s)) on the full grid for the given (image, class) pairs: (pairs, H, W)."""
    fused = real(cams[0]).new_zeros(len(image), *size)
    for cam in cams:
        plain = real(cam[image, category])
        flipped = real(cam[len(cam) // 2 + image, category]).flip(-1)
        plain, flipped = (resize(maps[:, None], size)[:, 0] for maps in (plain, flipped))
        fused += torch.maximum(plain, flipped).relu()
    return fused


def _min_max(maps: Tensor, inside: Tensor) -> Tensor:
    """(x − min) / (max − min + 1e-5) of each (H, W) map with the extremes of the pixels inside."""
    low = maps.masked_fill(~inside, torch.inf).amin((1, 2), keepdim=True)
    high = maps.masked_fill(~inside, -torch.inf).amax((1, 2), keepdim=True)
    return (maps - low) / (high - low + MIN_MAX_EPSILON)
