"""Two-component Gaussian mixture on a histogram over [0, 1], and the split of eq. 6.

The log odds of the foreground are a quadratic a + b·x + c·x², so that one EM iteration is: odds at the bin centres, a
logistic function, and the three moments of the foreground (mass, Σx, Σx²); those of the background are the rest.
Iterations are extrapolated and run until no parameter moves by 1e-8, far tighter than the usual stopping rules.
"""

from __future__ import annotations

from math import isfinite, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_ITERATIONS = 150  # of two EM steps each; only components that no split can tell apart need more
TOLERANCE = 1e-8  # of the largest change of a parameter
MIN_WEIGHT = 1e-3  # a component with less of the mass is no component
GAP_DENSITY = 1e-9  # share of the mass spread over empty bins, so that the split of a gap is where the components cross


class Mixture(NamedTuple):
    """Weight of the foreground (the component with the larger mean), means and variances."""

    weight: float
    mean_background: float
    mean_foreground: float
    variance_background: float
    variance_foreground: float

    def log_odds(self) -> Array:
        """(a, b, c) with log π_fg N_fg(x) − log π_bg N_bg(x) = a + b·x + c·x²."""
        weight, mean0, mean1, variance0, variance1 = self
        constant = log(weight / (1 - weight)) + 0.5 * log(variance0 / variance1)
        return np.array(
            [
                constant + 0.5 * (mean0**2 / variance0 - mean1**2 / variance1),
                mean1 / variance1 - mean0 / variance0,
                0.5 * (1 / variance0 - 1 / variance1),
            ]
        )

    def ordered(self) -> Mixture:
        """The same mixture with the component of the larger mean as the foreground."""
        weight, mean0, mean1, variance0, variance1 = self
        return self if mean0 <= mean1 else Mixture(1 - weight, mean1, mean0, variance1, variance0)


UNFITTED = Mixture(0.0, 0.0, 0.0, 0.0, 0.0)  # stands in a state that has seen no mixture yet


def fit(counts: Array, floor: float, start: Mixture | None = None) -> Mixture | None:
    """EM run to convergence; the likelier of the fits from `start` and from the two-means split of the histogram.

    `counts` (bins,) covers [0, 1] in equal bins; bins with their centre at or below `floor` take no part.
    None where there is no mixture: fewer than two bins filled, non-finite counts, a component without mass.
    """
    counts, centres = _used(counts, floor)
    if not isfinite(counts.sum()) or np.count_nonzero(counts > 0) < 2:
        return None
    powers = np.stack((np.ones_like(centres), centres, centres**2), 1)
    moments = counts[:, None] / counts.sum() * powers
    variance_floor = float(centres[1] - centres[0]) ** 2  # a component narrower than a bin cannot be told from one bin
    starts = [_two_means(moments, variance_floor)] if start is None else [start, _two_means(moments, variance_floor)]
    fits = [found for first in starts if (found := _maximise(first, powers, moments, variance_floor)) is not None]
    return max(fits, key=lambda mixture: _log_likelihood(mixture, powers, moments), default=None)


def split(counts: Array, floor: float, mixture: Mixture) -> float | None:
    """ξ* of eq. 6: the split that maximises Σ_{x≥ξ} log π_fg N_fg(x) + Σ_{x<ξ} log π_bg N_bg(x).

    The best bin edge, moved to where the components cross between the centres on its two sides.
    None where all samples fall on one side.
    """
    counts, centres = _used(counts, floor)
    odds = np.stack((np.ones_like(centres), centres, centres**2), 1) @ mixture.log_odds()
    gain = odds * (counts + GAP_DENSITY * counts.sum())
    best = int(np.argmax(np.cumsum(gain[::-1])[::-1]))  # the first bin of the foreground
    if counts[:best].sum() == 0 or counts[best:].sum() == 0:
        return None
    below, above = odds[best - 1], odds[best]
    return float(centres[best - 1] + (centres[best] - centres[best - 1]) * below / (below - above))


def _used(counts: Array, floor: float) -> tuple[Array, Array]:
    """The bins that take part and their centres."""
    centres = (np.arange(len(counts)) + 0.5) / len(counts)
    used = centres > floor
    return counts[used], centres[used]


def _two_means(moments: Array, variance_floor: float) -> Mixture:
    """The exact two-means clustering of the histogram, as a mixture: the split with the largest variance between."""
    below = np.cumsum(moments, 0)[:-1]
    above = moments.sum(0) - below
    filled = (below[:, 0] > 0) & (above[:, 0] > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below[:, 1] ** 2 / below[:, 0] + above[:, 1] ** 2 / above[:, 0]
    best = int(np.argmax(np.where(filled, between, -np.inf)))
    return _from_moments(above[best].tolist(), moments.sum(0).tolist(), variance_floor)


def _maximise(mixture: Mixture, powers: Array, moments: Array, variance_floor: float) -> Mixture | None:
    """EM from `mixture` until a step moves no parameter; None where a component loses its mass."""
    for _ in range(MAX_ITERATIONS):
        first = _step(mixture, powers, moments, variance_floor)
        second = None if first is None else _step(first, powers, moments, variance_floor)
        if first is None or second is None:
            return None
        if max(abs(new - old) for new, old in zip(second, first, strict=True)) < TOLERANCE:
            return second.ordered()
        leap = _extrapolate(mixture, first, second, variance_floor)
        mixture = max(second, leap, key=lambda candidate: _log_likelihood(candidate, powers, moments))
    return mixture.ordered()


def _step(mixture: Mixture, powers: Array, moments: Array, variance_floor: float) -> Mixture | None:
    """One EM iteration; None where a component keeps no mass."""
    foreground = (_responsibility(powers @ mixture.log_odds()) @ moments).tolist()
    if not MIN_WEIGHT < foreground[0] < 1 - MIN_WEIGHT:
        return None
    return _from_moments(foreground, moments.sum(0).tolist(), variance_floor)


def _extrapolate(start: Mixture, first: Mixture, second: Mixture, variance_floor: float) -> Mixture:
    """Squared extrapolation of two EM steps (SQUAREM): overlapping components take tens of turns, not thousands."""
    change = np.subtract(first, start)
    curvature = np.subtract(second, first) - change
    norm = float(np.linalg.norm(curvature))
    length = max(float(np.linalg.norm(change)) / norm, 1.0) if norm > 0 else 1.0
    leap = Mixture(*(np.array(start) + 2 * length * change + length**2 * curvature).tolist())
    sound = MIN_WEIGHT < leap.weight < 1 - MIN_WEIGHT and min(leap[3:]) >= variance_floor
    return leap if sound else second


def _responsibility(log_odds: Array) -> Array:
    """Logistic function without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * log_odds))


def _from_moments(foreground: list[float], total: list[float], variance_floor: float) -> Mixture:
    """Maximisation: weight, means and variances from (mass, Σx, Σx²) of the foreground and of everything."""
    background = [everything - part for everything, part in zip(total, foreground, strict=True)]
    means, variances = [], []
    for mass, first, second in (background, foreground):
        means.append(first / mass)
        variances.append(max(second / mass - (first / mass) ** 2, variance_floor))
    return Mixture(foreground[0] / total[0], *means, *variances)


def _log_likelihood(mixture: Mixture, powers: Array, moments: Array) -> float:
    """Mean log likelihood of the histogram up to a constant."""
    centres = powers[:, 1]
    background = -((centres - mixture.mean_background) ** 2) / mixture.variance_background
    background = 0.5 * (background - log(mixture.variance_background)) + log(1 - mixture.weight)
    return float(moments[:, 0] @ (background + np.logaddexp(0, powers @ mixture.log_odds())))
