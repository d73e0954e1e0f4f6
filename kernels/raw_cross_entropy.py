"""Cross entropy against the CAM pseudo-label, weighted by reliability (eq. 5)."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .runtime import scalar_on
from .sums import balanced_loss
from .validation import (
    TensorChecks,
    check_category_type,
    check_number,
    check_pair,
    check_perplexity,
    check_threshold,
)


def raw_cross_entropy(
    logits: Tensor,
    confidence: Tensor,
    category: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None = None,
    *,
    alpha: float = 0.8,
    beta: float = 1.0,
    foreground_weight: float | None = None,
    ignore_band: tuple[float, float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of the segmentation against the CAM pseudo-label, weighted by reliability (eq. 5): Σ r·CE / Σ r.

    The pseudo-label is the category where ν ≥ ξ and background below; r = 1/P. The sums run over the usable pixels of
    the whole batch.

    Args:
        logits: (B, K, h, w), bilinearly upsampled to (H, W) inside; the only differentiable input.
        confidence: (B, H, W) in [0, 1], or (T, B, H, W) for T targets on the same logits.
        category: integers of the same shape; 0 counts as background, values outside 0..C (255 among them) are ignored.
        threshold: ξ strictly inside (0, 1): float or 0-d tensor, or (T,) tensor for T targets.
        valid: (B, H, W) bool, the real pixels; None: all.
        alpha, beta: of the perplexity; beta = 0 gives every pixel reliability 1.
        foreground_weight: f in [0, 1] gives f·(Σ r·CE / Σ r over foreground) + (1 − f)·(the same over background).
            Where one of the two is empty it contributes 0 and the share of the other stays as it is.
        ignore_band: (low, high) replaces the pseudo-label by: the category where ν ≥ high, background where ν ≤ low,
            ignored between. The reliability is still taken at the threshold.

    Returns:
        () loss, or (T,) losses. Without a usable pixel: loss 0, gradient 0.

    Raises:
        ValueError: wrong shape, dtype or device; a parameter out of its range; uint8 categories for more than 254
            classes.
    """
    checks = TensorChecks()
    checks.check("logits", logits, "B K h w")
    several = isinstance(confidence, Tensor) and confidence.ndim == 4
    checks.check("confidence", confidence, "T B H W" if several else "B H W")
    checks.check("category", category, "T B H W" if several else "B H W", "integer")
    check_category_type(category, checks["K"] - 1)
    checks.check_optional("valid", valid, "B H W", "bool")
    check_threshold(threshold, ((), (checks["T"],)) if several else ((),))
    check_perplexity(alpha, beta)
    if foreground_weight is not None:
        check_number("foreground_weight", foreground_weight, 0, 1)
    if ignore_band is not None:
        check_pair("ignore_band", ignore_band, 0, 1)
    if not several:
        confidence, category = confidence[None], category[None]
    sums = reference.raw_cross_entropy(
        logits,
        confidence,
        category,
        scalar_on(confidence.device, threshold).expand(len(confidence)),
        valid,
        alpha=alpha,
        beta=beta,
        ignore_band=ignore_band,
    )
    losses = balanced_loss(sums, foreground_weight)
    return losses if several else losses[0]
