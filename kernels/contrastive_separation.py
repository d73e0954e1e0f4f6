"""Contrastive separation over low-perplexity pixels (eqs. 9, 10)."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .sums import mean_loss
from .validation import TensorChecks, check_choice, check_number, check_perplexity, check_threshold


def contrastive_separation(
    cam: Tensor,
    category: Tensor,
    confidence: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None = None,
    *,
    epsilon: float = 1.0,
    temperature: float = 0.5,
    alpha: float = 0.8,
    beta: float = 1.0,
    scope: str = "image",
    similarity: str = "cosine",
    backend: str = "auto",
) -> Tensor:
    """Contrastive separation of the CAM vectors of reliable pixels (eqs. 9, 10).

    Ω: usable pixels with perplexity ≤ ε. For i ∈ Ω, positives p share its pseudo-label, negatives n have another
    (background is a label like any other); the loss is
    1/|Ω| Σ_i mean_p softplus(logsumexp_n(s_in/τc) − s_ip/τc). Anchors without positives or negatives contribute 0.

    Args:
        cam: (B, C, h, w) raw CAM logits of ON; the only differentiable input.
        category: (B, h, w) integers; values outside 0..C are ignored.
        confidence: (B, h, w) in [0, 1]; below the threshold a pixel's label is background.
        threshold: ξ† strictly inside (0, 1); float or 0-d tensor.
        valid: (B, h, w) bool; None: all.
        epsilon: ε ≥ 0.
        temperature: τc > 0.
        alpha, beta: of the perplexity.
        scope: pairs within an "image", or over the whole "batch". |Ω| counts the whole batch in either.
        similarity: "cosine" (vectors of norm ≤ 1e-6 have similarity 0 to all and get no gradient) or "dot".

    Returns:
        () loss; 0 with gradient 0 where Ω is empty.

    Raises:
        ValueError: wrong shape, dtype or device; a parameter out of its range.
    """
    checks = TensorChecks()
    checks.check("cam", cam, "B C h w")
    checks.check("category", category, "B h w", "integer")
    checks.check("confidence", confidence, "B h w")
    checks.check_optional("valid", valid, "B h w", "bool")
    check_threshold(threshold)
    check_number("epsilon", epsilon, 0)
    check_number("temperature", temperature, 0, open_low=True)
    check_perplexity(alpha, beta)
    check_choice("scope", scope, ("image", "batch"))
    check_choice("similarity", similarity, ("cosine", "dot"))
    sums = reference.contrastive_separation(
        cam,
        category,
        confidence,
        threshold,
        valid,
        epsilon=epsilon,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        scope=scope,
        similarity=similarity,
    )
    return mean_loss(sums)
