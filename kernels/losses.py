"""The co-training losses and the dense Gaussian filter (METHOD section 5)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import reference
from .validation import (
    TensorChecks,
    check_backend,
    check_choice,
    check_class_count,
    check_number,
    check_pair,
    check_perplexity,
    check_scales,
    check_size,
    check_threshold,
)


def raw_cross_entropy(
    logits: Tensor,
    confidence: Tensor,
    category: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None = None,
    *,
    alpha: float = 0.8,
    beta: float = 1.0,
    foreground_weight: float | None = None,
    ignore_band: tuple[float, float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of the segmentation against the CAM pseudo-label, weighted by reliability (eq. 5): Σ r·CE / Σ r.

    The pseudo-label is the category where ν ≥ ξ and background below; r = 1/P. The sums run over the usable pixels of
    the whole batch.

    Args:
        logits: (B, K, h, w), bilinearly upsampled to (H, W) inside; the only differentiable input.
        confidence: (B, H, W) in [0, 1], or (T, B, H, W) for T targets on the same logits.
        category: integers of the same shape; 0 counts as background, values outside 0..C (255 among them) are ignored.
        threshold: ξ strictly inside (0, 1): float or 0-d tensor, or (T,) tensor for T targets.
        valid: (B, H, W) bool, the real pixels; None: all.
        alpha, beta: of the perplexity; beta = 0 gives every pixel reliability 1.
        foreground_weight: f in [0, 1] gives f·(Σ r·CE / Σ r over foreground) + (1 − f)·(the same over background).
            Where one of the two is empty it contributes 0 and the share of the other stays as it is.
        ignore_band: (low, high) replaces the pseudo-label by: the category where ν ≥ high, background where ν ≤ low,
            ignored between. The reliability is still taken at the threshold.

    Returns:
        () loss, or (T,) losses. Without a usable pixel: loss 0, gradient 0.

    Raises:
        ValueError: wrong shape, dtype or device; a parameter out of its range; K > 255.
    """
    check_backend(backend)
    checks = TensorChecks()
    checks.check("logits", logits, "B K h w")
    check_class_count("logits", checks["K"] - 1)
    several = isinstance(confidence, Tensor) and confidence.ndim == 4
    checks.check("confidence", confidence, "T B H W" if several else "B H W")
    checks.check("category", category, "T B H W" if several else "B H W", "integer")
    checks.check_optional("valid", valid, "B H W", "bool")
    check_threshold(threshold, ((), (checks["T"],)) if several else ((),))
    check_perplexity(alpha, beta)
    if foreground_weight is not None:
        check_number("foreground_weight", foreground_weight, 0, 1)
    if ignore_band is not None:
        check_pair("ignore_band", ignore_band, 0, 1)
    return reference.raw_cross_entropy(
        logits,
        confidence,
        category,
        threshold,
        valid,
        alpha=alpha,
        beta=beta,
        foreground_weight=foreground_weight,
        ignore_band=ignore_band,
    )


def seg_to_cam_loss(
    cam: Tensor,
    teacher_logits: Sequence[Tensor],
    image_labels: Tensor,
    size: tuple[int, int],
    valid: Tensor | None = None,
    *,
    temperature: float = 0.01,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Binary cross entropy of σ(M) against the segmentation pseudo-label (eqs. 7, 8), over valid cells and classes.

    S' is the sum over scales and flips of the logits upsampled to (H, W). The target is softmax(S'/τ) over background
    and the present classes, background dropped, bilinearly reduced to (h, w) without antialias; absent classes and
    images without a class have target 0. It is evaluated only at the pixels that the reduction reads, without gradient.

    Args:
        cam: (B, C, h, w) raw CAM logits; the only differentiable input.
        teacher_logits: per scale (2B, K, h_s, w_s); rows B.. computed on the flipped images.
        image_labels: (B, C), present where > 0, any dtype.
        size: (H, W) of the full grid.
        valid: (B, H, W) bool; a cell counts when every pixel that its target reads (with weight > 0) is valid.
        temperature: τ > 0.
        relu: put a ReLU on M first, as the published recipe does: the loss then has the floor ln 2 on absent classes.

    Returns:
        () loss; 0 with gradient 0 without a valid cell.

    Raises:
        ValueError: wrong shape, dtype or device; temperature not positive.
    """
    check_backend(backend)
    height, width = check_size(size)
    checks = TensorChecks(H=height, W=width)
    checks.check("cam", cam, "B C h w")
    checks = checks.with_pairs()
    check_scales("teacher_logits", teacher_logits, checks, "K")
    checks.check("image_labels", image_labels, "B C", "number")
    checks.check_optional("valid", valid, "B H W", "bool")
    check_number("temperature", temperature, 0, open_low=True)
    return reference.seg_to_cam_loss(
        cam, teacher_logits, image_labels, (height, width), valid, temperature=temperature, relu=relu
    )


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
    check_backend(backend)
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
    return reference.contrastive_separation(
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
    check_backend(backend)
    checks = TensorChecks()
    checks.check("values", values, "B K h w")
    checks.check("guide", guide, "B 3 h w", "number")
    check_number("sigma_xy", sigma_xy, 0, open_low=True)
    check_number("sigma_rgb", sigma_rgb, 0, open_low=True)
    return reference.bilateral_filter(values, guide, sigma_xy, sigma_rgb)


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
    check_backend(backend)
    checks = TensorChecks()
    checks.check("probabilities", probabilities, "B K h w")
    checks.check("guide", guide, "B 3 h w", "number")
    checks.check("gate", gate, "B h w")
    check_number("sigma_xy", sigma_xy, 0, open_low=True)
    check_number("sigma_rgb", sigma_rgb, 0, open_low=True)
    return reference.dense_energy(probabilities, guide, gate, sigma_xy, sigma_rgb)
