"""The confidence histogram (METHOD section 4)."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .validation import TensorChecks, fail


def histogram(confidence: Tensor, valid: Tensor | None, bins: int = 256, *, backend: str = "auto") -> Tensor:
    """Histogram of the valid confidences over [0, 1]; additive over batches and ranks.

    Args:
        confidence: any shape, in [0, 1]; what lies outside goes to the outermost bins.
        valid: bool of the same shape; None: all.
        bins: at least 2; bin k is [k/bins, (k+1)/bins), the last one includes 1.

    Returns:
        (bins,) float32 counts, exact up to 2^24.

    Raises:
        ValueError: wrong shape, dtype or device; bins not an integer ≥ 2.
    """
    axes = " ".join(f"n{axis}" for axis in range(getattr(confidence, "ndim", 0)))
    checks = TensorChecks()
    checks.check("confidence", confidence, axes)
    checks.check_optional("valid", valid, axes, "bool")
    if not isinstance(bins, int) or bins < 2:
        raise fail("bins", repr(bins), "an integer >= 2")
    return reference.histogram(confidence, valid, bins)
