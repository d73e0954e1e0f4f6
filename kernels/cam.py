"""From CAMs to confidence, category, perplexity and the dynamic threshold (METHOD sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import reference
from .validation import (
    TensorChecks,
    check_backend,
    check_class_count,
    check_number,
    check_pair,
    check_perplexity,
    check_scales,
    check_size,
    check_threshold,
    fail,
)


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
        confidence (B, H, W) float32 in [0, 1] (float64 for float64 CAMs); category (B, H, W) uint8 in 1..C. Ties, and
        pixels where every map is 0, take the lowest present class. Both are 0 outside `valid` and in images without
        a class.

    Raises:
        ValueError: wrong shape, dtype or device; more than 254 classes.
    """
    check_backend(backend)
    height, width = check_size(size)
    checks = TensorChecks(H=height, W=width)
    checks.check("image_labels", image_labels, "B C", "number")
    check_class_count("image_labels", checks["C"])
    checks = checks.with_pairs()
    check_scales("cams", cams, checks, "C")
    checks.check_optional("valid", valid, "B H W", "bool")
    return reference.fuse_cams(cams, image_labels, (height, width), valid)


def perplexity(
    confidence: Tensor, threshold: float | Tensor, alpha: float = 0.8, beta: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """Perplexity of CAM confidences (eq. 4): P = [−log(α·d)]^β, high near the threshold.

    d = (ν − ξ)/(1 − ξ) where ν ≥ ξ and (ξ − ν)/ξ below, kept in [1e-4, 1]; so P is in [(−log α)^β, (−log 1e-4·α)^β].

    Args:
        confidence: ν in [0, 1], any shape.
        threshold: ξ strictly inside (0, 1); float or 0-d tensor (whose value is not checked).
        alpha: λα strictly inside (0, 1).
        beta: λβ ≥ 0; 0 gives P = 1 everywhere.

    Raises:
        ValueError: a parameter out of its range, wrong dtype or shape.
    """
    check_backend(backend)
    if not isinstance(confidence, Tensor) or not confidence.is_floating_point():
        came = f"dtype {confidence.dtype}" if isinstance(confidence, Tensor) else type(confidence).__name__
        raise fail("confidence", came, "a floating-point tensor")
    check_threshold(threshold)
    check_perplexity(alpha, beta)
    return reference.perplexity(confidence, threshold, alpha, beta)


def histogram(confidence: Tensor, valid: Tensor | None, bins: int = 256, *, backend: str = "auto") -> Tensor:
    """Histogram of the valid confidences over [0, 1]; additive over batches and ranks.

    Args:
        confidence: any shape, in [0, 1]; what lies outside goes to the outermost bins.
        valid: bool of the same shape; None: all.
        bins: at least 2; bin k is [k/bins, (k+1)/bins), the last one includes 1.

    Returns:
        (bins,) float32 counts, exact up to 2^24.

    Raises:
        ValueError: wrong shape, dtype or device; bins not an integer ≥ 2.
    """
    check_backend(backend)
    axes = " ".join(f"n{axis}" for axis in range(getattr(confidence, "ndim", 0)))
    checks = TensorChecks()
    checks.check("confidence", confidence, axes)
    checks.check_optional("valid", valid, axes, "bool")
    if not isinstance(bins, int) or bins < 2:
        raise fail("bins", repr(bins), "an integer >= 2")
    return reference.histogram(confidence, valid, bins)


def fit_mixture(
    histogram: Tensor,
    state: Tensor | None = None,
    *,
    floor: float = 0.05,
    clamp: tuple[float, float] = (0.2, 0.9),
    smoothing: float = 0.9,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dynamic threshold ξ: a two-component Gaussian mixture on the histogram and its likelihood split (eq. 6).

    EM runs to convergence on the bins, from the two-means split and from the previous mixture; the likelier fit counts.
    ξ* maximises Σ_{x≥ξ} log π_fg N_fg(x) + Σ_{x<ξ} log π_bg N_bg(x); it is clamped, then smoothed.

    Args:
        histogram: (bins,) counts over [0, 1], at least 2 bins.
        state: what the previous call returned, or None at first.
        floor: bins with their centre at or below it take no part.
        clamp: (low, high) range of ξ.
        smoothing: s in [0, 1): ξ = s·previous + (1 − s)·ξ*. Without a previous fit ξ = ξ*.

    Returns:
        ξ () float32 and the new state (6,) float32: ξ, weight of the foreground, means and variances of background and
        foreground; weight 0 stands for no fit so far. Where there is no mixture (empty histogram, a single filled bin,
        everything on one side of the split, non-finite counts): the previous ξ and state, or the middle of the clamp.

    Raises:
        ValueError: wrong shape or dtype; a parameter out of its range.
    """
    check_backend(backend)
    checks = TensorChecks()
    checks.check("histogram", histogram, "bins")
    if checks["bins"] < 2:
        raise fail("histogram", f"{checks['bins']} bin", "at least 2 bins")
    checks.check_optional("state", state, "6", "float32")
    check_number("floor", floor, 0, 1, open_high=True)
    check_pair("clamp", clamp, 0, 1)
    check_number("smoothing", smoothing, 0, 1, open_high=True)
    return reference.fit_mixture(histogram, state, floor=floor, clamp=clamp, smoothing=smoothing)
