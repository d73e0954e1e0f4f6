"""The confidence histogram and the dynamic threshold (eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import real
from .mixture import UNFITTED, Mixture, fit, split


@torch.no_grad()
def histogram(confidence: Tensor, valid: Tensor | None, bins: int = 256) -> Tensor:
    """Counts of the valid confidences in equal bins [k/bins, (k+1)/bins) over [0, 1]; 1 falls into the last bin."""
    index = (real(confidence) * bins).long().clamp(0, bins - 1)
    index = index.flatten() if valid is None else index[valid]
    return torch.bincount(index, minlength=bins).float()


@torch.no_grad()
def fit_mixture(
    histogram: Tensor,
    state: Tensor | None = None,
    *,
    floor: float = 0.05,
    clamp: tuple[float, float] = (0.2, 0.9),
    smoothing: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """ξ of eq. 6 from a two-component Gaussian mixture; state = (ξ, weight, mean, mean, variance, variance)."""
    low, high = clamp
    previous = None if state is None else state.tolist()
    start = Mixture(*previous[1:]) if previous and previous[1] > 0 else None
    counts = histogram.double().cpu().numpy()
    mixture = fit(counts, floor, start)
    found = None if mixture is None else split(counts, floor, mixture)
    if mixture is None or found is None:
        kept = [(low + high) / 2, *UNFITTED] if previous is None else previous
        kept[0] = min(max(kept[0], low), high)
        result = torch.tensor(kept, dtype=torch.float32, device=histogram.device)
        return result[0].clone(), result
    threshold = min(max(found, low), high)
    if start is not None and previous is not None:
        threshold = min(max(smoothing * previous[0] + (1 - smoothing) * threshold, low), high)
    result = torch.tensor([threshold, *mixture], dtype=torch.float32, device=histogram.device)
    return result[0].clone(), result
