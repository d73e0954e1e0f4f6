"""Contrastive separation (eqs. 9, 10)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import real
from .cross_entropy import perplexity, pseudo_labels

ZERO_NORM = 1e-6  # CAM vectors up to this norm have no direction


def contrastive_separation(
    cam: Tensor,
    image_labels: Tensor | None,
    category: Tensor,
    confidence: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None,
    *,
    epsilon: float,
    temperature: float,
    alpha: float,
    beta: float,
    scope: str,
    similarity: str,
) -> Tensor:
    """Eqs. 9, 10: (2,) sum over the anchors of Ω, the usable pixels with P ≤ ε, and |Ω|; pairs within an image, or over
    the batch (scope "batch"). With image labels the vectors are the CAM's probabilities, without them its logits."""
    label, selected = select_anchors(category, confidence, threshold, valid, cam.shape[1], epsilon, alpha, beta)
    channels = real(cam) if image_labels is None else probabilities(real(cam), image_labels)
    vectors = channels.flatten(2).transpose(1, 2)  # (B, N, C), or (B, N, 1 + C)
    if similarity == "cosine":
        vectors = directions(vectors)
    label, selected = label.flatten(1), selected.flatten(1)
    count = selected.sum()
    if scope == "batch":  # all of Ω as one image without other pixels
        vectors, label, selected = vectors[selected][None], label[selected][None], selected[selected][None]
    total = _separation(vectors @ vectors.mT / temperature, label, selected)
    return torch.stack((total, count.to(total.dtype)))


def select_anchors(
    category: Tensor,
    confidence: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None,
    num_classes: int,
    epsilon: float,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The pseudo-labels, int64, and Ω, bool: the usable pixels with P ≤ ε."""
    confidence = real(confidence.detach())
    label, usable = pseudo_labels(confidence, category, threshold, valid, num_classes)
    return label, usable & (perplexity(confidence, threshold, alpha, beta) <= epsilon)


def probabilities(cam: Tensor, image_labels: Tensor) -> Tensor:
    """(B, C, h, w) logits M and labels Y → (B, 1 + C, h, w) [1 − max_c Y_c·σ(M_c), Y_1·σ(M_1), …, Y_C·σ(M_C)]."""
    present = (image_labels > 0)[:, :, None, None]
    # σ is monotone, and 1 − σ(x) = σ(−x). Of equal maxima max(dim) takes the first; without any −∞ is left: σ(∞) = 1.
    largest = cam.masked_fill(~present, -torch.inf).max(1, keepdim=True).values
    return torch.cat(((-largest).sigmoid(), cam.sigmoid().where(present, 0)), 1)


def directions(vectors: Tensor) -> Tensor:
    """Vectors (..., C) scaled to norm 1; those without a direction become constant zeros: no NaN gradient."""
    square = vectors.square().sum(-1, keepdim=True)
    directed = square > ZERO_NORM**2
    return (vectors * square.where(directed, 1).rsqrt()).where(directed, 0)


def _separation(scores: Tensor, label: Tensor, selected: Tensor) -> Tensor:
    """Σ over anchors of the mean over positives p of softplus(logsumexp over negatives − s_p); scores (G, N, N)."""
    pairs = selected[:, :, None] & selected[:, None, :]
    equal = label[:, :, None] == label[:, None, :]
    itself = torch.eye(label.shape[1], dtype=torch.bool, device=label.device)
    positive, negative = pairs & equal & ~itself, pairs & ~equal
    # Rows without negatives count nothing, but a logsumexp over nothing would still turn their gradient into NaN.
    anchors = negative.any(2, keepdim=True)
    negatives = scores.masked_fill(~negative & anchors, -torch.inf).logsumexp(2, keepdim=True)
    terms = -F.logsigmoid(scores - negatives)
    weight = (positive & anchors).to(scores.dtype) / positive.sum(2, keepdim=True).clamp(min=1)
    return (weight * terms).sum()
