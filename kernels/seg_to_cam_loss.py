"""Binary cross entropy of the CAM against the segmentation pseudo-label (eqs. 7, 8)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import reference
from .sums import mean_loss
from .validation import TensorChecks, check_number, check_scales, check_size


def seg_to_cam_loss(
    cam: Tensor,
    teacher_logits: Sequence[Tensor],
    image_labels: Tensor,
    size: tuple[int, int],
    valid: Tensor | None = None,
    *,
    temperature: float = 0.01,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Binary cross entropy of σ(M) against the segmentation pseudo-label (eqs. 7, 8), over valid cells and classes.

    S' is the sum over scales and flips of the logits upsampled to (H, W). The target is softmax(S'/τ) over background
    and the present classes, background dropped, bilinearly reduced to (h, w) without antialias; absent classes and
    images without a class have target 0. It is evaluated only at the pixels that the reduction reads, without gradient.

    Args:
        cam: (B, C, h, w) raw CAM logits; the only differentiable input.
        teacher_logits: per scale (2B, K, h_s, w_s); rows B.. computed on the flipped images.
        image_labels: (B, C), present where > 0, any dtype.
        size: (H, W) of the full grid.
        valid: (B, H, W) bool; a cell counts when every pixel that its target reads (with weight > 0) is valid.
        temperature: τ > 0.
        relu: put a ReLU on M first, as the published recipe does: the loss then has the floor ln 2 on absent classes.

    Returns:
        () loss; 0 with gradient 0 without a valid cell.

    Raises:
        ValueError: wrong shape, dtype or device; temperature not positive.
    """
    height, width = check_size(size)
    checks = TensorChecks(H=height, W=width)
    checks.check("cam", cam, "B C h w")
    checks = checks.with_pairs()
    check_scales("teacher_logits", teacher_logits, checks, "K")
    checks.check("image_labels", image_labels, "B C", "number")
    checks.check_optional("valid", valid, "B H W", "bool")
    check_number("temperature", temperature, 0, open_low=True)
    sums = reference.seg_to_cam_loss(
        cam, teacher_logits, image_labels, (height, width), valid, temperature=temperature, relu=relu
    )
    return mean_loss(sums)
