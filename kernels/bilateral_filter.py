"""The exact dense Gaussian filter A(V)_i = Σ_j exp(−½|f_i − f_j|²)·V_j with f = (xy/σ_xy, rgb/σ_rgb), i = j included:
the filter of METHOD section 5.5, and of mean-field inference in fully connected CRFs (cosa_fast.evaluation.crf).

The kernel is symmetric, so the backward is the filter itself: dL/dV = A(dL/dA). V (B, K, h, w), guide (B, 3, h, w).
Nothing of size N×N (N = h·w) is stored; the inputs, 4·K·N + 3·N bytes of an image, stay in the cache. The work is per
pair of pixels, B·N² of them: 8 operations for the distance, one exponential, and 96 products on tensor cores per 32
channels. So a program keeps 64 pixels i (features and sums in registers) and goes over tiles of 32 pixels j of one
image row: positions come from indices, the vertical distance is one number per pixel i and turn, and rows out of reach
are left out. Distances are squared differences, exact for equal colours; |a|² + |b|² − 2a·b would be as inexact as |a|²
is large. Tensor cores take each factor in two parts of 11 bits: as exact as float32 (`_product`). 64×32 is the largest
tile without spills on sm_90 and leaves room for three programs on a multiprocessor, which hide each other's loads.

`run_filter` also serves dense_energy: with a gate it stores A(V)·gate/B and each program's part of −Σ V·A(V)·gate/B.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import reference
from .launch.runtime import architecture, ceil_div, configure, launch, strides, tl, triton_jit, use_triton
from .validation import TensorChecks, check_number

# Rows of pixels further away than this many σ_xy weigh less than e^-50: nothing in float32.
REACH = 10.0
GATE_STRIDES = ("gate_stride0", "gate_stride1", "gate_stride2")


@triton_jit
def _colour(guide_ptr, at, stride1, inside, scale):
    """The three colour features of the pixels at offsets `at`."""
    plane = tl.full((), 1, tl.int64) * stride1
    red = tl.load(guide_ptr + at, mask=inside, other=0).to(tl.float32) * scale
    green = tl.load(guide_ptr + (at + plane), mask=inside, other=0).to(tl.float32) * scale
    blue = tl.load(guide_ptr + (at + 2 * plane), mask=inside, other=0).to(tl.float32) * scale
    return red, green, blue


@triton_jit
def _further(exponent, of_i, of_j):
    """exponent − (f_i − f_j)², for every pair."""
    difference = of_i[:, None] - of_j[None, :]
    return exponent - difference * difference


@triton_jit
def _product(weights, values, SPLIT: tl.constexpr):
    """weights @ values in float32; SPLIT: by tensor cores, which read the upper 11 bits of a mantissa.

    Each tile has a sum of its own: tensor cores cut off the digits of a small number that they add to a large sum.
    """
    if SPLIT:
        weights_high = (weights.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        values_high = ((values.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        product = tl.dot(weights - weights_high, values_high, input_precision="tf32")
        product = tl.dot(weights_high, values - values_high, product, input_precision="tf32")
        product = tl.dot(weights_high, values_high, product, input_precision="tf32")
    else:
        product = tl.dot(weights, values, input_precision="ieee")
    return product


@triton_jit
def _filter_kernel(
    values_ptr,  # (B, K, h, w) any float, any strides: V
    guide_ptr,  # (B, 3, h, w) any number, any strides
    gate_ptr,  # (B, h, w) any float, any strides; None: plain filter
    out_ptr,  # (B, K, h, w) A(V), or float32 A(V)·gate/B
    partial_ptr,  # (B, chunks, tiles) float32: this program's part of −Σ V·A(V)·gate/B; None without gate
    channels,
    height,
    width,
    reach,
    scale_xy,
    scale_rgb,
    share,
    values_stride0, values_stride1, values_stride2, values_stride3,
    guide_stride0, guide_stride1, guide_stride2, guide_stride3,
    gate_stride0, gate_stride1, gate_stride2,
    SPLIT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, image, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    values_ptr += image * values_stride0
    guide_ptr += image * guide_stride0
    pixels = height * width
    pixel = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = pixel < pixels
    x, y = (pixel % width).to(tl.int64), (pixel // width).to(tl.int64)
    red, green, blue = _colour(guide_ptr, y * guide_stride2 + x * guide_stride3, guide_stride1, inside, scale_rgb)
    right, down = x.to(tl.float32) * scale_xy, y.to(tl.float32)
    channel = (chunk * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    wanted = (channel < channels)[None, :]

    result = tl.zeros((BLOCK_I, BLOCK_K), tl.float32)
    # Rows of the image that no pixel of this tile reaches are left out.
    first = tl.maximum(tile * BLOCK_I // width - reach, 0)
    last = tl.minimum((tl.minimum(tile * BLOCK_I + BLOCK_I, pixels) - 1) // width + reach, height - 1)
    row, start = first, 0
    for _ in range((last - first + 1) * tl.cdiv(width, BLOCK_J)):
        # Pixels j of one row: the vertical distance is one number per pixel i.
        column = (start + tl.arange(0, BLOCK_J)).to(tl.int64)
        known = column < width
        there = row.to(tl.int64) * guide_stride2 + column * guide_stride3
        red_j, green_j, blue_j = _colour(guide_ptr, there, guide_stride1, known, scale_rgb)
        apart = (down - row) * scale_xy
        exponent = _further((-apart * apart)[:, None], right, column.to(tl.float32) * scale_xy)
        exponent = _further(_further(_further(exponent, red, red_j), green, green_j), blue, blue_j)
        values_at = row.to(tl.int64) * values_stride2 + column[:, None] * values_stride3
        values_at += channel[None, :] * values_stride1
        value = tl.load(values_ptr + values_at, mask=known[:, None] & wanted, other=0.0).to(tl.float32)
        result += _product(tl.exp2(exponent), value, SPLIT)
        start += BLOCK_J
        row, start = tl.where(start < width, row, row + 1), tl.where(start < width, start, 0)

    stored = inside[:, None] & wanted
    if gate_ptr is not None:
        gate_at = image * gate_stride0 + y * gate_stride1 + x * gate_stride2
        result *= (tl.load(gate_ptr + gate_at, mask=inside, other=0.0).to(tl.float32) * share)[:, None]
        own_at = y[:, None] * values_stride2 + x[:, None] * values_stride3 + channel[None, :] * values_stride1
        own = tl.load(values_ptr + own_at, mask=stored, other=0.0).to(tl.float32)
        partial = -tl.sum(tl.sum(own * result, axis=1), axis=0)
        tl.store(partial_ptr + (image * tl.num_programs(2) + chunk) * tl.num_programs(0) + tile, partial)
    out_at = (image * channels + channel[None, :]) * pixels + pixel[:, None]
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=stored)


def run_filter(
    values: Tensor,
    guide: Tensor,
    gate: Tensor | None,
    out: Tensor,
    sigma_xy: float,
    sigma_rgb: float,
) -> Tensor:
    """Writes A(V) to `out` (B, K, h, w) and returns it. With a gate, writes A(V)·gate/B and returns the programs' parts
    of −Σ V·A(V)·gate/B."""
    batch, channels, height, width = values.shape
    scale = math.sqrt(0.5 / math.log(2))  # exp(−½·d²) = 2^−(scale·d)²
    chosen = configure("bilateral_filter", channels, values.device)
    grid = (ceil_div(height * width, chosen.blocks["BLOCK_I"]), batch, ceil_div(channels, chosen.blocks["BLOCK_K"]))
    partial = None
    if gate is not None:
        partial = torch.empty((batch, grid[2], grid[0]), dtype=torch.float32, device=values.device)
    launch(
        _filter_kernel,
        grid,
        chosen,
        values_ptr=values,
        guide_ptr=guide,
        gate_ptr=gate,
        out_ptr=out,
        partial_ptr=partial,
        channels=channels,
        height=height,
        width=width,
        reach=min(math.ceil(REACH * sigma_xy), height),
        scale_xy=scale / sigma_xy,
        scale_rgb=scale / sigma_rgb,
        share=1 / batch,
        **strides("values_stride", values),
        **strides("guide_stride", guide),
        **(strides("gate_stride", gate) if gate is not None else dict.fromkeys(GATE_STRIDES, 0)),
        SPLIT=not architecture(values.device).startswith("gfx"),
    )
    return out if partial is None else partial


@torch.library.custom_op("cosa_fast::bilateral_filter", mutates_args=())
def _forward(values: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    run_filter(values, guide, None, out, sigma_xy, sigma_rgb)
    return out


@torch.library.custom_op("cosa_fast::bilateral_filter_backward", mutates_args=())
def _backward(gradient: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    run_filter(gradient, guide, None, out, sigma_xy, sigma_rgb)
    return out


@_forward.register_fake
def _(values: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    return torch.empty(values.shape, dtype=torch.float32, device=values.device)


@_backward.register_fake
def _(gradient: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, guide, ctx.sigma_xy, ctx.sigma_rgb = inputs
    ctx.dtype = values.dtype
    ctx.save_for_backward(guide)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (guide,) = ctx.saved_tensors
    return _backward(gradient, guide, ctx.sigma_xy, ctx.sigma_rgb, ctx.dtype), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


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
    if use_triton(backend, values):
        return _forward(values, guide, float(sigma_xy), float(sigma_rgb))
    return reference.bilateral_filter(values, guide, sigma_xy, sigma_rgb)
