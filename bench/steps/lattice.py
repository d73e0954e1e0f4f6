"""A Gaussian filter on the permutohedral lattice (Adams, Baek, Davis 2010), on the CPU: how the field computes its
dense-CRF losses. Approximate: the kernel is that of a blur between lattice points.

NumPy and SciPy's sparse products over all points at once; the authors' filter is C++ over one point at a time. Both
take time in proportion to the points, where the exact filter takes their square.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


def lattice_filter(values: Floats, features: Floats) -> Floats:
    """Σ_j exp(−½|f_i − f_j|²)·v_j, about: values (N, K), features (N, d) → (N, K)."""
    from scipy import sparse  # as in baseline.py: a step without energy does without

    corners, weights = _enclosing_simplex(features)
    keys, steps = _packed(corners)
    points, place = np.unique(keys, return_inverse=True)
    owner = np.repeat(np.arange(len(values)), weights.shape[1])
    splat = sparse.csr_matrix((weights.ravel(), (place.ravel(), owner)), shape=(len(points), len(values)))
    lattice = splat @ values
    for step in steps:
        padded = np.concatenate([lattice, np.zeros_like(lattice[:1])])  # its last row: points that hold nothing
        lattice = lattice + 0.5 * (padded[_find(points, points + step)] + padded[_find(points, points - step)])
    return (splat.T @ lattice) / np.float32(1 + 2.0 ** -features.shape[1])


def _enclosing_simplex(features: Floats) -> tuple[Integers, Floats]:
    """The d + 1 lattice points around every point, (N, d + 1, d) of their d + 1 coordinates, and their weights."""
    count, d = features.shape
    axis = np.arange(1, d + 1)
    scaled = features * (np.sqrt(2 / 3) * (d + 1) / np.sqrt(axis * (axis + 1))).astype(np.float32)
    elevated = np.zeros((count, d + 1), dtype=np.float32)  # in the plane where coordinates add up to 0
    elevated[:, :d] = np.cumsum(scaled[:, ::-1], 1)[:, ::-1]
    elevated[:, 1:] -= axis.astype(np.float32) * scaled
    base = np.round(elevated / (d + 1)).astype(np.int64)  # the nearest point with all coordinates divisible by d + 1,
    rank = np.argsort(np.argsort(base * (d + 1) - elevated, axis=1), axis=1) + base.sum(1, keepdims=True)
    base += (rank < 0).astype(np.int64) - (rank > d)  # made to lie in the plane
    rank %= d + 1
    residual = np.empty_like(elevated)
    np.put_along_axis(residual, d - rank, elevated / (d + 1) - base, 1)
    weights = np.diff(residual, axis=1, prepend=residual[:, -1:] - 1)
    number = np.arange(d + 1)[:, None]
    corners = (base[:, None] * (d + 1) + number - (d + 1) * (rank[:, None] > d - number))[:, :, :d]
    return corners, weights.astype(np.float32)


def _packed(corners: Integers) -> tuple[Integers, list[Any]]:
    """One integer per lattice point (N, d + 1), and the differences to the neighbours along the d + 1 directions."""
    d = corners.shape[2]
    low, high = corners.min((0, 1)) - d - 1, corners.max((0, 1)) + d + 1
    radix = np.cumprod(np.concatenate([[1], high[:-1] - low[:-1] + 1]))
    one_less = -radix.sum()
    return (corners - low) @ radix, [*(one_less + (d + 1) * radix), one_less]


def _find(points: Integers, wanted: Integers) -> Integers:
    """Where the sorted `points` hold what is wanted; their number where they do not."""
    place = np.searchsorted(points, wanted)
    return np.where(points[np.minimum(place, len(points) - 1)] == wanted, place, len(points))
