"""The exact dense Gaussian filter and the gated dense-CRF energy (METHOD section 5.5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import real

# Subnormal numbers are 40 times slower on a CPU: the Gaussian kernel stays above e^-50, and the values that it filters
# are 0 below 1e-15 of the largest: both are nothing in float32, and their products are normal numbers.
KERNEL_FLOOR = -50.0
VALUE_FLOOR = 1e-15
TILE_ELEMENTS = 2**20  # of the Gaussian kernel matrix held at once: 4 MiB stay in the cache


def _gaussian_filter(values: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """A(V)_i = Σ_j exp(−½|f_i − f_j|²)·V_j with f = (xy/σ_xy, rgb/σ_rgb), the pair i = j included; (B, K, h, w)."""
    values = real(values)
    height, width = values.shape[2:]
    rows, columns = (torch.arange(n, dtype=values.dtype, device=values.device) for n in (height, width))
    position = torch.stack(torch.meshgrid(rows, columns, indexing="ij")) / sigma_xy
    filtered = [
        _filter_points(torch.cat((position, image.to(values) / sigma_rgb)).flatten(1).T, points.flatten(1).T)
        for image, points in zip(guide, values, strict=True)
    ]
    return torch.stack(filtered).mT.reshape(values.shape)


def _filter_points(features: Tensor, values: Tensor) -> Tensor:
    """Gaussian kernel of (N, 5) features applied to (N, K) values, in tiles of rows: (N, K)."""
    # −½|a − b|² = a·b − ½|a|² − ½|b|² as one matrix product; small centred features keep its cancellation harmless.
    features = features - features.mean(0)
    half_square = features.square().sum(1, keepdim=True) / 2
    one = torch.ones_like(half_square)
    left, right = torch.cat((features, -half_square, one), 1), torch.cat((features, one, -half_square), 1).T
    largest = values.abs().max()
    scale = largest.where(largest > 0, 1)
    values = values / scale
    values = values.where(values.abs() >= VALUE_FLOOR, 0)
    tile = max(TILE_ELEMENTS // len(features), 1)
    filtered = [(rows @ right).clamp_(min=KERNEL_FLOOR).exp_() @ values for rows in left.split(tile)]
    return torch.cat(filtered) * scale


class _BilateralFilter(torch.autograd.Function):
    """The kernel is symmetric: the gradient of the values is the filtered gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
        ctx.save_for_backward(guide)
        ctx.sigmas, ctx.dtype = (sigma_xy, sigma_rgb), values.dtype
        return _gaussian_filter(values, guide, sigma_xy, sigma_rgb)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (guide,) = ctx.saved_tensors
        return _gaussian_filter(gradients[0], guide, *ctx.sigmas).to(ctx.dtype), None, None, None


class _DenseEnergy(torch.autograd.Function):
    """−Σ S·A(S)·gate / B with the method's own backward −2·gate·A(S)/B, the derivative where the gate is constant."""

    @staticmethod
    def forward(
        ctx: Any, probabilities: Tensor, guide: Tensor, gate: Tensor, sigma_xy: float, sigma_rgb: float
    ) -> Tensor:
        gated = _gaussian_filter(probabilities, guide, sigma_xy, sigma_rgb)
        gated *= real(gate)[:, None] / len(gate)
        ctx.save_for_backward(gated)
        ctx.dtype = probabilities.dtype
        return -(real(probabilities) * gated).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gated,) = ctx.saved_tensors
        return (gradients[0] * -2 * gated).to(ctx.dtype), None, None, None, None


def bilateral_filter(values: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """A(V) with the exact Gaussian kernel; differentiable in the values."""
    return _BilateralFilter.apply(values, guide, sigma_xy, sigma_rgb)


def dense_energy(probabilities: Tensor, guide: Tensor, gate: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """METHOD section 5.5: −Σ S·A(S)·gate / B; differentiable in the probabilities."""
    return _DenseEnergy.apply(probabilities, guide, gate, sigma_xy, sigma_rgb)
