"""The dynamic threshold from a confidence histogram (eq. 6)."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .validation import TensorChecks, check_number, check_pair, fail


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
    checks = TensorChecks()
    checks.check("histogram", histogram, "bins")
    if checks["bins"] < 2:
        raise fail("histogram", f"{checks['bins']} bin", "at least 2 bins")
    checks.check_optional("state", state, "6", "float32")
    check_number("floor", floor, 0, 1, open_high=True)
    check_pair("clamp", clamp, 0, 1)
    check_number("smoothing", smoothing, 0, 1, open_high=True)
    return reference.fit_mixture(histogram, state, floor=floor, clamp=clamp, smoothing=smoothing)
