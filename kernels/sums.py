"""From sums to losses. The operators return numerators and normalisers apart: a loss over several ranks, or over the
parts of a batch, divides the sums of all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Gives the whole batch's normaliser for that of the images at hand.
Whole = Callable[[Tensor], Tensor]


def mean_loss(sums: Tensor, whole: Whole | None = None) -> Tensor:
    """(..., 2) numerator and normaliser → their ratio (...); 0, with gradient 0, where nothing was counted.

    With `whole`, the normaliser is what it returns: the result is then these images' share, and the sum of the shares
    is the loss of the whole batch.
    """
    numerator, normaliser = sums.unbind(-1)
    normaliser = normaliser.detach()
    if whole is not None:
        normaliser = whole(normaliser.clone())
    counted = normaliser > 0
    return torch.where(counted, numerator, 0) / torch.where(counted, normaliser, 1)


def balanced_loss(sums: Tensor, foreground_weight: float | None, whole: Whole | None = None) -> Tensor:
    """(T, 2, 2) sums of background and foreground → (T,) losses: one ratio, or f·foreground + (1 − f)·background."""
    if foreground_weight is None:
        return mean_loss(sums.sum(1), whole)
    background, foreground = mean_loss(sums, whole).unbind(1)
    return foreground_weight * foreground + (1 - foreground_weight) * background
