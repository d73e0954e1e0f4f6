"""Perplexity (eq. 4), pseudo-labels, and the cross entropy weighted by reliability (eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import real
from .resample import resize

DISTANCE_FLOOR = 1e-4  # d of eq. 4 is cut off here: the perplexity stays finite at the threshold
THRESHOLD_MARGIN = 1e-6  # ξ of a tensor, whose value nobody checked, is kept this far inside (0, 1)


def _inside(threshold: float | Tensor, like: Tensor) -> Tensor:
    """ξ as a tensor of the confidence's type and device, strictly inside (0, 1)."""
    threshold = torch.as_tensor(threshold, dtype=like.dtype, device=like.device)
    return threshold.clamp(THRESHOLD_MARGIN, 1 - THRESHOLD_MARGIN)


def perplexity(confidence: Tensor, threshold: float | Tensor, alpha: float = 0.8, beta: float = 1.0) -> Tensor:
    """Eq. 4: P = [−log(α·d)]^β with d = (ν−ξ)/(1−ξ) where ν ≥ ξ and (ξ−ν)/ξ below, d in [1e-4, 1]."""
    confidence = real(confidence)
    threshold = _inside(threshold, confidence)
    above = (confidence - threshold) / (1 - threshold)
    below = (threshold - confidence) / threshold
    distance = torch.where(confidence >= threshold, above, below).clamp(DISTANCE_FLOOR, 1)
    return (-(alpha * distance).log()) ** beta


def pseudo_labels(
    confidence: Tensor,
    category: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None,
    num_classes: int,
    ignore_band: tuple[float | Tensor, float | Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """CPL (METHOD section 4) as (label int64, 0 where unusable; usable bool). Categories outside 0..C are unusable.

    The category where ν ≥ ξ, background below. With a band (low, high): the category where ν ≥ high, background where
    ν ≤ low, unusable between.
    """
    category = category.long()
    usable = (category >= 0) & (category <= num_classes)
    if valid is not None:
        usable = usable & valid
    if ignore_band is None:
        foreground = confidence >= _inside(threshold, confidence)
    else:
        low, high = ignore_band
        foreground = confidence >= high
        usable = usable & (foreground | (confidence <= low))
    return category.where(foreground & usable, 0), usable


def labels_and_reliabilities(
    logits: Tensor,
    confidence: Tensor,
    category: Tensor,
    threshold: Tensor,
    valid: Tensor | None,
    *,
    alpha: float,
    beta: float,
    ignore_band: Sequence[float] | Sequence[tuple[float, float]] | None,
) -> tuple[Tensor, Tensor]:
    """CPL and r = 1/P of T targets (T, ...); r is 0 where a pixel is unusable, and in the type of the logits."""
    confidence = real(confidence.detach())
    each_target = (-1, *[1] * (confidence.ndim - 1))
    threshold = threshold.reshape(each_target)
    band = None
    if ignore_band is not None:  # one for all targets, or one for each
        low, high = (bound.reshape(each_target) for bound in confidence.new_tensor(ignore_band).reshape(-1, 2).T)
        band = (low, high)
    label, usable = pseudo_labels(confidence, category, threshold, valid, logits.shape[1] - 1, band)
    reliability = perplexity(confidence, threshold, alpha, beta).reciprocal() * usable
    return label, reliability.to(logits.dtype)


def sums_by_side(label: Tensor, reliability: Tensor, cross_entropy: Tensor) -> Tensor:
    """Σ r·CE and Σ r of background and foreground pixels: (T, 2, 2) from (T, ...) each."""
    terms = torch.stack((reliability * cross_entropy, reliability), 1)  # (T, 2, ...)
    foreground = (label > 0)[:, None]
    return torch.stack([(terms * side).flatten(2).sum(2) for side in (~foreground, foreground)], 1)


def raw_cross_entropy(
    logits: Tensor,
    confidence: Tensor,
    category: Tensor,
    threshold: Tensor,
    valid: Tensor | None,
    *,
    alpha: float,
    beta: float,
    ignore_band: Sequence[float] | Sequence[tuple[float, float]] | None,
) -> Tensor:
    """Sums of eq. 5 for T targets (T, B, H, W) on the same logits, apart for background and foreground pixels:
    (T, 2, 2), the last axis being Σ r·CE and Σ r with r = 1/P."""
    logits = real(logits)
    label, reliability = labels_and_reliabilities(
        logits, confidence, category, threshold, valid, alpha=alpha, beta=beta, ignore_band=ignore_band
    )
    log_probability = resize(logits, (confidence.shape[2], confidence.shape[3])).log_softmax(1)
    cross_entropy = -log_probability.gather(1, label.transpose(0, 1)).transpose(0, 1)  # (T, B, H, W)
    return sums_by_side(label, reliability, cross_entropy)
