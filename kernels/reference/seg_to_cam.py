"""Binary cross entropy of the CAM against the segmentation pseudo-label (eqs. 7, 8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import present_slots, real
from .resample import ReducedPixels


def seg_to_cam_loss(
    cam: Tensor,
    teacher_logits: Sequence[Tensor],
    image_labels: Tensor,
    size: tuple[int, int],
    valid: Tensor | None,
    *,
    temperature: float,
    relu: bool,
) -> Tensor:
    """Eqs. 7, 8: (2,) sum of the binary cross entropy of σ(M), or of σ(relu(M)), against SPL on the (h, w) grid, and
    the number of its terms."""
    cam = real(cam)
    pixels = ReducedPixels(size, (cam.shape[2], cam.shape[3]), cam.device)
    target = _segmentation_target(teacher_logits, image_labels, pixels, temperature).to(cam.dtype)
    loss = F.binary_cross_entropy_with_logits(cam.relu() if relu else cam, target, reduction="none")
    if valid is None:
        return torch.stack((loss.sum(), loss.new_tensor(loss.numel())))
    inside = pixels.all_true(valid)[:, None]
    return torch.stack((loss.where(inside, 0).sum(), (inside.sum() * cam.shape[1]).to(loss.dtype)))


@torch.no_grad()
def _segmentation_target(
    teacher_logits: Sequence[Tensor], image_labels: Tensor, pixels: ReducedPixels, temperature: float
) -> Tensor:
    """Eq. 7, SPL on the (h, w) grid: softmax(S'/τ) over background and present classes; (B, C, h, w)."""
    classes, filled = present_slots(image_labels)
    batch, categories = image_labels.shape
    channels = F.pad(classes + 1, (1, 0))  # (B, 1 + P) channels of S', background first
    image = torch.arange(batch, device=channels.device)[:, None]
    flips_summed = (
        real(maps[image, channels]) + real(maps[batch + image, channels]).flip(-1) for maps in teacher_logits
    )
    summed = torch.stack([pixels.evaluate(maps) for maps in flips_summed]).sum(0)
    absent = F.pad(~filled, (1, 0))[:, :, None, None]
    probability = (summed / temperature).masked_fill(absent, -torch.inf).softmax(1)
    reduced = pixels.reduce(probability[:, 1:])
    target = reduced.new_zeros(batch, categories, *reduced.shape[2:])
    target[image.expand_as(classes)[filled], classes[filled]] = reduced[filled]
    return target
