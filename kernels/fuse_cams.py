"""Multi-scale, flipped CAMs to confidence and category (METHOD section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import reference
from .validation import TensorChecks, check_scales, check_size


def fuse_cams(
    cams: Sequence[Tensor],
    image_labels: Tensor,
    size: tuple[int, int],
    valid: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Fuse multi-scale, flipped CAMs into confidence ν = max_c M'_c and category ŷ = argmax_c M'_c + 1.

    On the full grid: max over {id, flipped back}, ReLU, sum over scales, (x − min)/(max − min + 1e-5) per image and
    class over the valid pixels, present classes only. Not differentiable.

    Args:
        cams: per scale (2B, C, h_s, w_s) raw CAM logits; rows B.. computed on the flipped images.
        image_labels: (B, C), present where > 0, any dtype.
        size: (H, W) of the grid.
        valid: (B, H, W) bool, the real pixels; None: all.

    Returns:
        confidence (B, H, W) float32 in [0, 1] (float64 for float64 CAMs); category (B, H, W) uint8
        (int16 for more than 254 classes) in 1..C. Ties, and pixels where every map is 0, take the lowest present class.
        Both are 0 outside `valid` and in images without a class.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    height, width = check_size(size)
    checks = TensorChecks(H=height, W=width)
    checks.check("image_labels", image_labels, "B C", "number")
    checks = checks.with_pairs()
    check_scales("cams", cams, checks, "C")
    checks.check_optional("valid", valid, "B H W", "bool")
    return reference.fuse_cams(cams, image_labels, (height, width), valid)
