"""The exact dense Gaussian filter."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .validation import TensorChecks, check_number


def bilateral_filter(
    values: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float, *, backend: str = "auto"
) -> Tensor:
    """Exact Gaussian filter A(V)_i = Σ_j exp(−½|f_i − f_j|²)·V_j with f = (xy/σ_xy, rgb/σ_rgb), i = j included.

    Not normalised; filter a channel of ones for the normaliser. No (N, N) matrix is held. Differentiable in the values
    (once). The relative error in float32 is about 1e-7·max|f|², 3e-5 for σ_rgb = 15.

    Args:
        values: (B, K, h, w).
        guide: (B, 3, h, w), 0..255.
        sigma_xy: > 0, in pixels of this grid.
        sigma_rgb: > 0, in units of the guide.

    Returns:
        (B, K, h, w) float32, or float64 for float64 values.

    Raises:
        ValueError: wrong shape, dtype or device; a sigma not positive.
    """
    checks = TensorChecks()
    checks.check("values", values, "B K h w")
    checks.check("guide", guide, "B 3 h w", "number")
    check_number("sigma_xy", sigma_xy, 0, open_low=True)
    check_number("sigma_rgb", sigma_rgb, 0, open_low=True)
    return reference.bilateral_filter(values, guide, sigma_xy, sigma_rgb)
