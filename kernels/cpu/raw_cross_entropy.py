"""Cross entropy weighted by reliability (eq. 5) on a CPU: image by image, the box of its valid pixels, a band of its
rows at a time.

A softmax does not change where one number is taken from all classes of a cell: upsampling takes one mix of these
numbers from all classes of a pixel. With the largest logit of every cell taken away no exponential overflows, and none
is lost unless the logits of a cell lie further apart than SPREAD; only then a pixel's own largest is looked for. The
forward keeps Σ_k exp z_k of every pixel, from which the backward has the probabilities:

    dL/dz[k] = Σ_t r_t·c[t, s_t]·(softmax_k − [k = y_t]),   c[t, s]: gradient of Σ r·CE of target t and side s
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference.common import real
from ..reference.cross_entropy import labels_and_reliabilities, sums_by_side
from .bands import Band, Box, Upsampling, box_of

SPREAD = 80.0  # exp(−80) is a normal float32


def raw_cross_entropy(
    logits: Tensor,
    confidence: Tensor,
    category: Tensor,
    threshold: Tensor,
    valid: Tensor | None,
    *,
    alpha: float,
    beta: float,
    ignore_band: Sequence[float] | Sequence[tuple[float, float]] | None,
) -> Tensor:
    """As reference.raw_cross_entropy: (T, 2, 2)."""
    logits = real(logits)
    size = (confidence.shape[2], confidence.shape[3])
    images = []
    for image in range(len(logits)):
        box = box_of(None if valid is None else valid[image], size)
        if box is None:
            continue
        label, reliability = labels_and_reliabilities(
            logits,
            confidence[:, image, *box],
            category[:, image, *box],
            threshold,
            None if valid is None else valid[image][box],
            alpha=alpha,
            beta=beta,
            ignore_band=ignore_band,
        )
        images.append(_Image(image, box, size, label, reliability))
    return _Sums.apply(logits, images, len(confidence))


@dataclass
class _Image:
    """An image's labels and r (T, rows, columns) in a box of its (H, W) pixels; of the forward Σ_k exp z_k and, where
    one was taken away, the largest z (rows, columns)."""

    index: int
    box: Box
    size: tuple[int, int]
    label: Tensor
    reliability: Tensor
    total: Tensor | None = None
    peak: Tensor | None = None

    def sums(self, logits: Tensor) -> Tensor:
        """Σ r·CE and Σ r (T, 2, 2) for logits (B, K, h, w), the largest of every cell 0."""
        logits = logits[self.index]
        entropy = torch.empty_like(self.reliability)
        self.total = total = torch.empty_like(self.reliability[0])
        self.peak = torch.empty_like(total) if bool(logits.amin() < -SPREAD) else None
        for band, z in Upsampling(logits, self.size, self.box).bands():
            own = z.gather(1, self.label[:, band.pixels].transpose(0, 1)).transpose(0, 1)
            if self.peak is not None:
                self.peak[band.pixels] = z.amax(1)
                z -= self.peak[band.pixels, None]
            total[band.pixels] = z.exp_().sum(1)
            entropy[:, band.pixels] = total[band.pixels].log() - own
        if self.peak is not None:
            entropy += self.peak
        return sums_by_side(self.label, self.reliability, entropy)

    def gradient(self, logits: Tensor, background: Tensor, foreground: Tensor) -> Tensor:
        """That of the logits (K, h, w) from those of Σ r·CE of each side (T,)."""
        assert self.total is not None
        sides = (foreground[:, None, None], background[:, None, None])
        weight = self.reliability * torch.where(self.label > 0, *sides)
        share = weight.sum(0) / self.total
        maps = Upsampling(logits[self.index], self.size, self.box)

        def of_values() -> Iterator[tuple[Band, Tensor]]:
            for band, z in maps.bands():
                if self.peak is not None:
                    z -= self.peak[band.pixels, None]
                z.exp_().mul_(share[band.pixels, None])
                label, drop = (each[:, band.pixels].transpose(0, 1) for each in (self.label, -weight))
                yield band, z.scatter_add_(1, label, drop)

        return maps.gather(of_values())


class _Sums(torch.autograd.Function):
    """Σ r·CE and Σ r (T, 2, 2) over images; differentiable in the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, images: Sequence[_Image], targets: int) -> Tensor:
        logits = logits - logits.amax(1, keepdim=True)
        ctx.save_for_backward(logits)
        ctx.images = images
        return sum((image.sums(logits) for image in images), logits.new_zeros(targets, 2, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        out = torch.zeros_like(logits)
        for image in ctx.images:
            out[image.index] = image.gradient(logits, *gradients[0][:, :, 0].unbind(1))
        return out, None, None
