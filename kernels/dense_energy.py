"""The gated dense-CRF energy (METHOD section 5.5)."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .validation import TensorChecks, check_number


def dense_energy(
    probabilities: Tensor, guide: Tensor, gate: Tensor, sigma_xy: float, sigma_rgb: float, *, backend: str = "auto"
) -> Tensor:
    """Gated dense-CRF energy −Σ S·A(S)·gate / B (METHOD section 5.5), A as in `bilateral_filter`.

    The gradient of S is the method's own rule −2·gate·A(S)/B, the derivative where the gate is constant. S, already
    multiplied by the region of interest, is the only differentiable input.

    Args:
        probabilities: S (B, K, h, w).
        guide: (B, 3, h, w), 0..255.
        gate: (B, h, w), ≥ 0.
        sigma_xy: > 0, in pixels of this grid.
        sigma_rgb: > 0, in units of the guide.

    Returns:
        () energy.

    Raises:
        ValueError: wrong shape, dtype or device; a sigma not positive.
    """
    checks = TensorChecks()
    checks.check("probabilities", probabilities, "B K h w")
    checks.check("guide", guide, "B 3 h w", "number")
    checks.check("gate", gate, "B h w")
    check_number("sigma_xy", sigma_xy, 0, open_low=True)
    check_number("sigma_rgb", sigma_rgb, 0, open_low=True)
    return reference.dense_energy(probabilities, guide, gate, sigma_xy, sigma_rgb)
