"""From sums to losses. The operators return numerators and normalisers apart, because a loss over several ranks, or
over the parts of a batch, is divided by the sum of all their normalisers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Maps the normaliser of the images at hand to that of the whole batch.
Whole = Callable[[Tensor], Tensor]


def mean_loss(sums: Tensor, whole: Whole | None = None) -> Tensor:
    """(..., 2) numerator and normaliser → their ratio (...); 0, with gradient 0, where nothing was counted.

    With `whole` the division is by what that returns. The result is then these images' share of the loss: the shares
    of all parts of a batch add up to its loss.
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
