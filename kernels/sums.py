"""From sums to losses. The operators return numerators and normalisers apart: a loss over several ranks divides the
sums of all of them."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_loss(sums: Tensor) -> Tensor:
    """(..., 2) numerator and normaliser → their ratio (...); 0, with gradient 0, where nothing was counted."""
    numerator, normaliser = sums.unbind(-1)
    normaliser = normaliser.detach()
    counted = normaliser > 0
    return torch.where(counted, numerator, 0) / torch.where(counted, normaliser, 1)


def balanced_loss(sums: Tensor, foreground_weight: float | None) -> Tensor:
    """(T, 2, 2) sums of background and foreground → (T,) losses: one ratio, or f·foreground + (1 − f)·background."""
    if foreground_weight is None:
        return mean_loss(sums.sum(1))
    background, foreground = mean_loss(sums).unbind(1)
    return foreground_weight * foreground + (1 - foreground_weight) * background
