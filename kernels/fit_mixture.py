"""The dynamic threshold from a confidence histogram (eq. 6), in one launch of one program.

The algorithm is that of mixture.py, step for step: the exact two-means split as the start, EM with squared
extrapolation run to convergence, a second fit from the previous mixture, the likelier of the two, the split of eq. 6,
clamp and smoothing. One EM step on the bins x with mass m: log odds a + b·x + c·x² of the foreground, responsibility
r = 1/(1 + e^−odds), moments Σ r·m·(1, x, x²); the background has the rest.

Both fits run side by side as vectors of two mixtures over (2, BLOCK) tiles, so a turn of the loop costs what the
slower needs; a fit that has ended keeps its result. A turn evaluates three mixtures: one EM step, then at once the
second step and the extrapolated leap; the one that is kept already has its moments and likelihood for the next turn.
Bins are read again, from the cache, at every evaluation, BLOCK at a time: registers do not depend on their number.

The arithmetic is float64 on purpose: EM stops when no parameter moves by 1e-8, the likelihoods of neighbouring
mixtures differ in the tenth digit, and 512 elements cost next to nothing. It moves 4·bins + 24 bytes in and 28 out, and
takes 6·bins exponentials and logarithms per turn; the time is latency, two dependent passes per turn.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from . import reference
from .launch.runtime import configure, launch, tl, triton_jit, use_triton
from .reference.mixture import GAP_DENSITY, MAX_ITERATIONS, MIN_WEIGHT, TOLERANCE
from .validation import TensorChecks, check_number, check_pair, fail


@triton_jit
def _log_odds(mixture):
    """(a, b, c) with log π_fg N_fg(x) − log π_bg N_bg(x) = a + b·x + c·x²."""
    weight, mean0, mean1, variance0, variance1 = mixture
    a = tl.log(weight / (1.0 - weight)) + 0.5 * tl.log(variance0 / variance1)
    a += 0.5 * (mean0 * mean0 / variance0 - mean1 * mean1 / variance1)
    return a, mean1 / variance1 - mean0 / variance0, 0.5 * (1.0 / variance0 - 1.0 / variance1)


@triton_jit
def _bins(histogram_ptr, stride, bins, first_bin, start, BLOCK: tl.constexpr):
    """Counts (0 in bins that take no part), centres and indices of a block of bins."""
    index = start + tl.arange(0, BLOCK)
    used = (index >= first_bin) & (index < bins)
    counts = tl.load(histogram_ptr + index.to(tl.int64) * stride, mask=used, other=0.0).to(tl.float64)
    return counts, (index.to(tl.float64) + 0.5) / bins, index


@triton_jit
def _evaluate(histogram_ptr, stride, bins, first_bin, total, mixture, BLOCK: tl.constexpr):
    """For (2,) mixtures: the moments (mass, Σx, Σx²) of the foreground and the mean log likelihood up to a constant."""
    a, b, c = _log_odds(mixture)
    weight, mean, variance = mixture[0], mixture[1], mixture[3]
    constant = tl.log(1.0 - weight) - 0.5 * tl.log(variance)
    m0, m1, m2, likelihood = weight * 0.0, weight * 0.0, weight * 0.0, weight * 0.0
    for start in range(0, bins, BLOCK):
        counts, centre, _index = _bins(histogram_ptr, stride, bins, first_bin, start, BLOCK)
        mass, x = (counts / total)[None, :], centre[None, :]
        odds = a[:, None] + b[:, None] * x + c[:, None] * (x * x)
        e = tl.exp(-tl.abs(odds))
        foreground = mass * tl.where(odds >= 0.0, 1.0, e) / (1.0 + e)
        background = constant[:, None] - 0.5 * ((x - mean[:, None]) * (x - mean[:, None]) / variance[:, None])
        likelihood += tl.sum(mass * (background + tl.maximum(odds, 0.0) + tl.log(1.0 + e)), 1)
        m0 += tl.sum(foreground, 1)
        m1 += tl.sum(foreground * x, 1)
        m2 += tl.sum(foreground * (x * x), 1)
    return m0, m1, m2, likelihood


@triton_jit
def _from_moments(mass, first, second, total_first, total_second, variance_floor):
    """Maximisation: (weight, means, variances) from the moments of the foreground and, with mass 1, of everything."""
    rest = 1.0 - mass
    mean0, mean1 = (total_first - first) / rest, first / mass
    variance0 = tl.maximum((total_second - second) / rest - mean0 * mean0, variance_floor)
    variance1 = tl.maximum(second / mass - mean1 * mean1, variance_floor)
    return mass, mean0, mean1, variance0, variance1


@triton_jit
def _minus(new, old):
    """What the five parameters of a mixture have moved by."""
    return new[0] - old[0], new[1] - old[1], new[2] - old[2], new[3] - old[3], new[4] - old[4]


@triton_jit
def _square(change):
    """The sum of squares of five changes."""
    total = change[0] * change[0] + change[1] * change[1] + change[2] * change[2]
    return total + change[3] * change[3] + change[4] * change[4]


@triton_jit
def _largest(new, old):
    """The largest change of a parameter."""
    change = _minus(new, old)
    of_means = tl.maximum(tl.abs(change[1]), tl.abs(change[2]))
    of_variances = tl.maximum(tl.abs(change[3]), tl.abs(change[4]))
    return tl.maximum(tl.abs(change[0]), tl.maximum(of_means, of_variances))


@triton_jit
def _ordered(mixture):
    """The same mixture with the component of the larger mean as the foreground."""
    weight, mean0, mean1, variance0, variance1 = mixture
    swapped = (1.0 - weight, mean1, mean0, variance1, variance0)
    return _choose(mean0 <= mean1, mixture, swapped)


@triton_jit
def _choose(condition, one, other):
    """The mixture `one` where the condition holds, else the other."""
    return (
        tl.where(condition, one[0], other[0]),
        tl.where(condition, one[1], other[1]),
        tl.where(condition, one[2], other[2]),
        tl.where(condition, one[3], other[3]),
        tl.where(condition, one[4], other[4]),
    )


@triton_jit
def _extrapolate(start, first, second, variance_floor, MIN_WEIGHT: tl.constexpr):
    """Squared extrapolation of two EM steps (SQUAREM); the second step where it leads nowhere."""
    change = _minus(first, start)
    curvature = _minus(_minus(second, first), change)
    norm = _square(curvature)
    length = tl.where(norm > 0.0, tl.sqrt(_square(change) / tl.where(norm > 0.0, norm, 1.0)), 1.0)
    length = tl.maximum(length, 1.0)
    leap = (
        start[0] + 2.0 * length * change[0] + length * length * curvature[0],
        start[1] + 2.0 * length * change[1] + length * length * curvature[1],
        start[2] + 2.0 * length * change[2] + length * length * curvature[2],
        start[3] + 2.0 * length * change[3] + length * length * curvature[3],
        start[4] + 2.0 * length * change[4] + length * length * curvature[4],
    )
    sound = (leap[0] > MIN_WEIGHT) & (leap[0] < 1.0 - MIN_WEIGHT)
    sound = sound & (leap[3] >= variance_floor) & (leap[4] >= variance_floor)
    return _choose(sound, leap, second)


@triton_jit
def _two_means(
    histogram_ptr, stride, bins, first_bin, total, filled, total_first, total_second, variance_floor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The exact two-means clustering as a mixture: the split after a bin with the largest variance between."""
    mass, first, seen = total * 0.0, total * 0.0, filled * 0
    best, best_at = total * 0.0 - 1.0, filled * 0
    for start in range(0, bins, BLOCK):
        counts, centre, index = _bins(histogram_ptr, stride, bins, first_bin, start, BLOCK)
        part, some = counts / total, (counts > 0.0).to(tl.int32)
        below, below_first = mass + tl.cumsum(part, 0), first + tl.cumsum(part * centre, 0)
        above, above_first = 1.0 - below, total_first - below_first
        # Counted, not weighed: rounding leaves some mass on an empty side.
        bins_below = seen + tl.cumsum(some, 0)
        splits = (bins_below > 0) & (bins_below < filled) & (below > 0.0) & (above > 0.0)
        between = below_first * below_first / tl.where(splits, below, 1.0)
        between = tl.where(splits, between + above_first * above_first / tl.where(splits, above, 1.0), -1.0)
        largest = tl.max(between, 0)
        best_at = tl.where(largest > best, start + tl.argmax(between, 0), best_at)
        best = tl.maximum(largest, best)
        mass, first, seen = mass + tl.sum(part, 0), first + tl.sum(part * centre, 0), seen + tl.sum(some, 0)
    m0, m1, m2 = total * 0.0, total * 0.0, total * 0.0
    for start in range(0, bins, BLOCK):
        counts, centre, index = _bins(histogram_ptr, stride, bins, first_bin, start, BLOCK)
        above = tl.where(index > best_at, counts / total, 0.0)
        m0, m1, m2 = m0 + tl.sum(above, 0), m1 + tl.sum(above * centre, 0), m2 + tl.sum(above * (centre * centre), 0)
    return _from_moments(tl.where((m0 > 0.0) & (m0 < 1.0), m0, 0.5), m1, m2, total_first, total_second, variance_floor)


@triton_jit
def _split(histogram_ptr, stride, bins, first_bin, total, mixture, GAP_DENSITY: tl.constexpr, BLOCK: tl.constexpr):
    """ξ* of eq. 6, and whether (0 or 1) there are samples on both sides of it."""
    a, b, c = _log_odds(mixture)
    gain_below, least, best = total * 0.0, total * 0.0, tl.full((), 0, tl.int32) + first_bin
    for start in range(0, bins, BLOCK):
        counts, centre, index = _bins(histogram_ptr, stride, bins, first_bin, start, BLOCK)
        used = (index >= first_bin) & (index < bins)
        gain = tl.where(used, (a + b * centre + c * (centre * centre)) * (counts + GAP_DENSITY * total), 0.0)
        # The gain of the foreground above an edge is largest where the gain below it is smallest.
        below = tl.where(used, gain_below + tl.cumsum(gain, 0) - gain, 1e300)
        smallest = tl.min(below, 0)
        best = tl.where(smallest < least, start + tl.argmin(below, 0), best)  # the first bin of the foreground
        least = tl.minimum(smallest, least)
        gain_below += tl.sum(gain, 0)
    samples_below = total * 0.0
    for start in range(0, bins, BLOCK):
        counts, centre, index = _bins(histogram_ptr, stride, bins, first_bin, start, BLOCK)
        samples_below += tl.sum(tl.where(index < best, counts, 0.0), 0)
    both = ((samples_below > 0.0) & (samples_below < total)).to(tl.int32)
    # Between the centres on both sides of the edge the log odds are taken as a line: where it crosses 0.
    x0, x1 = (best.to(tl.float64) - 0.5) / bins, (best.to(tl.float64) + 0.5) / bins
    odds0, odds1 = a + b * x0 + c * (x0 * x0), a + b * x1 + c * (x1 * x1)
    return x0 + (x1 - x0) * odds0 / tl.where(odds0 == odds1, -1.0, odds0 - odds1), both


@triton_jit
def _previous(state_ptr, stride):
    """ξ and the mixture of the previous call in float64, and whether there is one (0 or 1); else a harmless mixture."""
    fitted = tl.load(state_ptr + stride) > 0.0
    mixture = (
        tl.where(fitted, tl.load(state_ptr + stride).to(tl.float64), 0.5),
        tl.where(fitted, tl.load(state_ptr + 2 * stride).to(tl.float64), 0.25),
        tl.where(fitted, tl.load(state_ptr + 3 * stride).to(tl.float64), 0.75),
        tl.where(fitted, tl.load(state_ptr + 4 * stride).to(tl.float64), 1.0),
        tl.where(fitted, tl.load(state_ptr + 5 * stride).to(tl.float64), 1.0),
    )
    return tl.load(state_ptr).to(tl.float64), mixture, fitted.to(tl.int32)


@triton_jit
def _fit_mixture_kernel(
    histogram_ptr,  # (bins,) any float, any stride: counts
    state_ptr,  # (6,) float32, any stride: ξ and mixture of the previous call; None: no previous call
    threshold_ptr,  # () float32: ξ
    out_ptr,  # (6,) float32: the new state
    bins,
    first_bin,  # the first bin that takes part
    histogram_stride,
    state_stride,
    low, high, middle,  # of the clamp
    smoothing,
    MAX_ITERATIONS: tl.constexpr,
    TOLERANCE: tl.constexpr,
    MIN_WEIGHT: tl.constexpr,
    GAP_DENSITY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    total, first, second = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    filled = 0
    for start in range(0, bins, BLOCK):
        counts, centre, index = _bins(histogram_ptr, histogram_stride, bins, first_bin, start, BLOCK)
        total, filled = total + tl.sum(counts, 0), filled + tl.sum((counts > 0.0).to(tl.int32), 0)
        first, second = first + tl.sum(counts * centre, 0), second + tl.sum(counts * (centre * centre), 0)
    # Finite, and at least two bins. Flags are integers: the interpreter cannot broadcast a comparison of scalars.
    usable = ((total - total == 0.0) & (filled >= 2)).to(tl.int32)
    total = tl.where(usable == 1, total, 1.0)
    first, second = first / total, second / total
    variance_floor = 1.0 / (tl.full((), 1.0, tl.float64) * bins * bins)
    two_means = _two_means(
        histogram_ptr, histogram_stride, bins, first_bin, total, filled, first, second, variance_floor, BLOCK
    )
    if state_ptr is None:
        kept, previous, fitted = tl.full((), 0.0, tl.float64) + middle, two_means, tl.full((), 0, tl.int32)
    else:
        kept, previous, fitted = _previous(state_ptr, state_stride)
    lane = tl.arange(0, 2)
    mixture = _choose(lane == 0, previous, two_means)
    m0, m1, m2, likelihood = _evaluate(histogram_ptr, histogram_stride, bins, first_bin, total, mixture, BLOCK)
    running = tl.where(lane == 1, usable, usable * fitted)
    found = running
    turn = 0
    while (turn < MAX_ITERATIONS) & (tl.max(running, 0) == 1):
        alive = (m0 > MIN_WEIGHT) & (m0 < 1.0 - MIN_WEIGHT)
        one = _from_moments(tl.where(alive, m0, 0.5), m1, m2, first, second, variance_floor)
        m0, m1, m2, _likelihood = _evaluate(histogram_ptr, histogram_stride, bins, first_bin, total, one, BLOCK)
        alive = alive & (m0 > MIN_WEIGHT) & (m0 < 1.0 - MIN_WEIGHT)
        two = _from_moments(tl.where(alive, m0, 0.5), m1, m2, first, second, variance_floor)
        converged = _largest(two, one) < TOLERANCE
        leap = _extrapolate(mixture, one, two, variance_floor, MIN_WEIGHT)
        m0, m1, m2, near = _evaluate(histogram_ptr, histogram_stride, bins, first_bin, total, two, BLOCK)
        n0, n1, n2, far = _evaluate(histogram_ptr, histogram_stride, bins, first_bin, total, leap, BLOCK)
        leaps = (far > near) & ~converged
        m0, m1, m2 = tl.where(leaps, n0, m0), tl.where(leaps, n1, m1), tl.where(leaps, n2, m2)
        # What has ended keeps its mixture; what has lost a component is no fit.
        kept_on = (running == 1) & alive
        mixture = _choose(kept_on, _choose(leaps, leap, two), mixture)
        likelihood = tl.where(kept_on, tl.where(leaps, far, near), likelihood)
        found = tl.where((running == 1) & ~alive, 0, found)
        running = tl.where(alive & ~converged, running, 0)
        turn += 1

    # The likelier fit; the one from the previous mixture where they are equal.
    best = (lane == tl.argmax(tl.where(found == 1, likelihood, -1e300), 0)) & (found == 1)
    exists = tl.max(found, 0)
    fit = _ordered((
        tl.where(exists == 1, tl.sum(tl.where(best, mixture[0], 0.0), 0), 0.5),
        tl.where(exists == 1, tl.sum(tl.where(best, mixture[1], 0.0), 0), 0.25),
        tl.where(exists == 1, tl.sum(tl.where(best, mixture[2], 0.0), 0), 0.75),
        tl.where(exists == 1, tl.sum(tl.where(best, mixture[3], 0.0), 0), 1.0),
        tl.where(exists == 1, tl.sum(tl.where(best, mixture[4], 0.0), 0), 1.0),
    ))  # fmt: skip
    edge, both_sides = _split(histogram_ptr, histogram_stride, bins, first_bin, total, fit, GAP_DENSITY, BLOCK)
    exists = exists * both_sides
    threshold = tl.minimum(tl.maximum(edge, low), high)
    threshold = tl.where(fitted == 1, smoothing * kept + (1.0 - smoothing) * threshold, threshold)
    threshold = tl.minimum(tl.maximum(tl.where(exists == 1, threshold, kept), low), high).to(tl.float32)
    tl.store(threshold_ptr, threshold)
    tl.store(out_ptr, threshold)
    for index in tl.static_range(5):
        if state_ptr is None:
            unfitted = tl.full((), 0.0, tl.float32)
        else:
            unfitted = tl.load(state_ptr + (1 + index) * state_stride)
        tl.store(out_ptr + 1 + index, tl.where(exists == 1, fit[index].to(tl.float32), unfitted))


def _run(
    histogram: Tensor, state: Tensor | None, floor: float, low: float, high: float, smoothing: float,
    threshold: Tensor, out: Tensor,
) -> None:  # fmt: skip
    bins = len(histogram)
    launch(
        _fit_mixture_kernel,
        (1,),
        configure("fit_mixture", bins, histogram.device),
        histogram_ptr=histogram,
        state_ptr=state,
        threshold_ptr=threshold,
        out_ptr=out,
        bins=bins,
        # In float64, as a centre may equal the floor, which the kernel would only get in float32.
        first_bin=bisect_right(range(bins), floor, key=lambda index: (index + 0.5) / bins),
        histogram_stride=histogram.stride(0),
        state_stride=1 if state is None else state.stride(0),
        low=low,
        high=high,
        middle=(low + high) / 2,
        smoothing=smoothing,
        MAX_ITERATIONS=MAX_ITERATIONS,
        TOLERANCE=TOLERANCE,
        MIN_WEIGHT=MIN_WEIGHT,
        GAP_DENSITY=GAP_DENSITY,
    )


@torch.library.custom_op("cosa_fast::fit_mixture", mutates_args=())
def _fit_mixture(
    histogram: Tensor, state: Tensor | None, floor: float, low: float, high: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    threshold = torch.empty((), dtype=torch.float32, device=histogram.device)
    out = torch.empty(6, dtype=torch.float32, device=histogram.device)
    _run(histogram, state, floor, low, high, smoothing, threshold, out)
    return threshold, out


@_fit_mixture.register_fake
def _(
    histogram: Tensor, state: Tensor | None, floor: float, low: float, high: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    threshold = torch.empty((), dtype=torch.float32, device=histogram.device)
    return threshold, torch.empty(6, dtype=torch.float32, device=histogram.device)


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
    if use_triton(backend, histogram):
        state = None if state is None else state.detach()
        return _fit_mixture(histogram.detach(), state, float(floor), float(clamp[0]), float(clamp[1]), float(smoothing))
    return reference.fit_mixture(histogram, state, floor=floor, clamp=clamp, smoothing=smoothing)
