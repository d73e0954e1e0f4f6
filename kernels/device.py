"""Device functions that several kernels share."""

from __future__ import annotations

from .runtime import tl, triton_jit


@triton_jit
def bilinear_tap(index, source, target):
    """The two elements of `source` that element `index` of `target` mixes (align_corners=False), as resample.py has it.

    (first int32, second int32, weight fp32 in [0, 1)) of (1 − weight)·x[first] + weight·x[second]. Taps are exact and
    inside the source for every index ≥ 0, also past the target's end; source·target must stay below 2^28.
    """
    numerator = (2 * index + 1) * source - target
    numerator = tl.minimum(tl.maximum(numerator, 0), 2 * target * (source - 1))
    # An integer division in five instructions instead of twenty: the float quotient is wrong by 1 at most.
    inverse = 1.0 / (2 * target)
    first = (numerator.to(tl.float32) * inverse).to(tl.int32)
    remainder = numerator - first * (2 * target)
    correction = (remainder >= 2 * target).to(tl.int32) - (remainder < 0).to(tl.int32)
    first += correction
    remainder -= correction * (2 * target)
    second = tl.minimum(first + 1, source - 1)
    return first, second, remainder.to(tl.float32) * inverse


@triton_jit
def log1p(x):
    """log(1 + x) for x in [0, 1] = 2 artanh(x / (2 + x)): relative error near 1e-7, also where 1 + x rounds to 1."""
    z = x / (2.0 + x)
    z2 = z * z
    series = 1.0 / 9 + z2 * (1.0 / 11 + z2 * (1.0 / 13))
    series = 1.0 + z2 * (1.0 / 3 + z2 * (1.0 / 5 + z2 * (1.0 / 7 + z2 * series)))
    return 2.0 * z * series
