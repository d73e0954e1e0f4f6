"""Contrastive separation (eqs. 9, 10) on a CPU: the anchors of one label after the other.

Ω sorted by label, the positives of an anchor i lie side by side, and all others are its negatives. With n_i the
logsumexp of its negatives' scores and m of its label in Ω

    L_i = Σ_p softplus(n_i − s_ip) / (m − 1)
    dL_i/ds_ip = −σ(n_i − s_ip) / (m − 1)                                             of a positive
    dL_i/ds_in = softmax_n(s_i over the negatives) · Σ_p σ(n_i − s_ip) / (m − 1)      of a negative

so the gradient of the vectors is a matter of two more products, and is made along with the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference.common import real
from ..reference.contrastive import directions, probabilities, select_anchors
from .bands import rows_at_once


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
    """As reference.contrastive_separation: (2,)."""
    label, selected = select_anchors(category, confidence, threshold, valid, cam.shape[1], epsilon, alpha, beta)
    channels = real(cam)
    if image_labels is not None:  # absent classes are 0 in all vectors of the batch: without them nothing changes
        present = (image_labels > 0).any(0)
        present[0] |= ~present.any()
        channels = probabilities(channels[:, present], image_labels[:, present])
    vectors = channels.flatten(2).transpose(1, 2)
    if similarity == "cosine":
        vectors = directions(vectors)
    label, selected = label.flatten(1), selected.flatten(1)
    if scope == "batch":
        vectors, label, selected = vectors.flatten(0, 1)[None], label.flatten()[None], selected.flatten()[None]
    total = _Separation.apply(vectors, label, selected, temperature)
    return torch.stack((total, selected.sum().to(total.dtype)))


class _Separation(torch.autograd.Function):
    """Σ L_i over the selected of vectors (G, N, D), pairs within each of G groups; differentiable in the vectors."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, label: Tensor, selected: Tensor, temperature: float) -> Tensor:
        total, gradient = vectors.new_zeros(()), torch.zeros_like(vectors)
        for group, chosen in enumerate(selected):
            at = chosen.nonzero()[:, 0]
            at = at[label[group, at].argsort(stable=True)]
            loss, slope = _separate(vectors[group, at], label[group, at], temperature)
            total += loss
            gradient[group, at] = slope
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None, None


def _separate(vectors: Tensor, label: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Σ L_i of (n, D) vectors sorted by label, and its gradient."""
    total, gradient = vectors.new_zeros(()), torch.zeros_like(vectors)
    scaled = vectors / temperature
    for anchors, positives in _tiles(label):
        scores = scaled[anchors] @ vectors.T
        near = scores[:, positives]
        itself = torch.arange(anchors.start, anchors.stop)[:, None] == torch.arange(positives.start, positives.stop)
        share = 1 / (near.shape[1] - 1)
        distance = -near
        near.fill_(-torch.inf)
        normaliser = scores.logsumexp(1, keepdim=True)
        distance += normaliser
        total -= F.logsigmoid(-distance).masked_fill_(itself, 0).sum() * share
        pull = distance.sigmoid_().masked_fill_(itself, 0).mul_(share)
        scores.sub_(normaliser).exp_().mul_(pull.sum(1, keepdim=True))
        near.copy_(pull.neg_())
        gradient[anchors] += scores @ scaled
        gradient.addmm_(scores.T, scaled[anchors])
    return total, gradient


def _tiles(label: Tensor) -> Iterator[tuple[slice, slice]]:
    """Anchors that have positives and negatives, some at a time, and the others of their label; from sorted labels."""
    height = rows_at_once(len(label))
    start = 0
    for count in label.unique_consecutive(return_counts=True)[1].tolist():
        stop = start + count
        if 1 < count < len(label):
            for first in range(start, stop, height):
                yield slice(first, min(first + height, stop)), slice(start, stop)
        start = stop
