"""The per-class CAMs of one image: fuse_cams before its maximum over classes.

Training never needs these maps. Evaluation does: the ensemble (M' + M†')/2 averages per class before the maximum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosa_fast.data_pipeline.batch import ignored
from cosa_fast.kernels import reference


def normalised_cams(cams: Sequence[Tensor], present: Tensor, size: tuple[int, int]) -> Tensor:
    """M' (METHOD section 3) of the present classes of one image.

    cams: one per scale, (2, C, h_s, w_s) raw CAMs, row 1 computed on the flipped image, or (1, C, h_s, w_s).
    present: (P,) integer class indices in 0..C-1. size: (H, W).
    Returns (P, H, W) float32 in [0, 1]: flip-max, ReLU, sum over scales, min–max per class.
    """
    return reference.class_maps(cams, 1, torch.zeros_like(present), present, size)


def strongest(maps: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence ν and category ŷ of (P, H, W) class maps: (H, W) float32, and int64 in 1..C; both 0 if P = 0."""
    if len(present) == 0:
        zeros = torch.zeros(maps.shape[1:], device=maps.device)
        return zeros, zeros.long()
    confidence, index = maps.max(0)
    return confidence, present[index] + 1


def classes_in(mask: Tensor) -> Tensor:
    """(P,) int64 indices in 0..C-1 of the foreground classes in a mask (H, W): the image's true label."""
    occurs = torch.bincount(mask[~ignored(mask)].long(), minlength=1) > 0
    return occurs[1:].nonzero()[:, 0]
