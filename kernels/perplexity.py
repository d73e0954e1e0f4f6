"""Perplexity of CAM confidences (eq. 4): P = [−log(α·d)]^β, elementwise.

d = (ν − ξ)/(1 − ξ) where ν ≥ ξ and (ξ − ν)/ξ below, kept in [1e-4, 1]. Backward: dP/dν = −β·[−log(α·d)]^(β−1)·d'/d,
d' = 1/(1 − ξ) above, −1/ξ below, 0 where d is cut off. Moves 4 bytes in and 4 out per float32 element, one logarithm.
`reliability` is 1/P as the cross entropy needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .launch.runtime import ceil_div, configure, four_axes, launch, scalar_on, strides, tl, triton_jit, use_triton
from .validation import check_perplexity, check_threshold, fail

LOG2E: Any = tl.constexpr(1.4426950408889634)
FLOOR: Any = tl.constexpr(reference.DISTANCE_FLOOR)
MARGIN: Any = tl.constexpr(reference.THRESHOLD_MARGIN)


@triton_jit
def keep_inside(threshold):
    """ξ of a tensor, whose value nobody checked, kept strictly inside (0, 1)."""
    return tl.minimum(tl.maximum(threshold, MARGIN), 1.0 - MARGIN)


@triton_jit
def distance(confidence, threshold):
    """d of eq. 4, not yet cut off."""
    above = (confidence - threshold) / (1.0 - threshold)
    below = (threshold - confidence) / threshold
    return tl.where(confidence >= threshold, above, below)


@triton_jit
def cut_off(d):
    """d kept in [1e-4, 1], so that its logarithm is finite."""
    return tl.minimum(tl.maximum(d, FLOOR), 1.0)


@triton_jit
def reliability(confidence, foreground, threshold, alpha, beta, UNIT: tl.constexpr, PLAIN: tl.constexpr):
    """r = 1/P = [−log(α·d)]^(−β), foreground where ν ≥ ξ; UNIT says that β is 0, PLAIN that it is 1.

    It takes one division and a base-2 logarithm: `distance` and a general power would cost as much as all the classes
    of VOC do.
    """
    if UNIT:
        result = tl.full(confidence.shape, 1.0, tl.float32)
    else:
        slope = tl.where(foreground, 1.0 / (1.0 - threshold), -1.0 / threshold)
        d = cut_off((confidence - threshold) * slope)
        logarithm = tl.log2(alpha * d) * (-1.0 / LOG2E)
        result = 1.0 / logarithm if PLAIN else tl.exp2(-beta * tl.log2(logarithm))
    return result


@triton_jit
def _perplexity_kernel(
    confidence_ptr,  # (n0, n1, n2, n3) any float, any strides
    threshold_ptr,  # () any float
    gradient_ptr,  # (n0, n1, n2, n3) any float, any strides: of P; only read for the backward
    out_ptr,  # (n0·n1·n2·n3,) P as float32, or dL/dν in the type of ν
    size,
    n1, n2, n3,
    stride0, stride1, stride2, stride3,
    gradient_stride0, gradient_stride1, gradient_stride2, gradient_stride3,
    alpha,
    beta,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    i3, i2, i1, i0 = offset % n3, offset // n3 % n2, offset // n3 // n2 % n1, offset // n3 // n2 // n1
    at = i0 * stride0 + i1 * stride1 + i2 * stride2 + i3 * stride3
    confidence = tl.load(confidence_ptr + at, mask=inside, other=0.0).to(tl.float32)
    threshold = keep_inside(tl.load(threshold_ptr).to(tl.float32))
    d = distance(confidence, threshold)
    clipped = cut_off(d)
    logarithm = -tl.log(alpha * clipped)
    if BACKWARD:
        at = i0 * gradient_stride0 + i1 * gradient_stride1 + i2 * gradient_stride2 + i3 * gradient_stride3
        gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.where(confidence >= threshold, 1.0 / (1.0 - threshold), -1.0 / threshold) / clipped
        power = tl.exp((beta - 1.0) * tl.log(logarithm))
        result = tl.where((d == clipped), -beta * power * slope * gradient, 0.0)
    else:
        result = tl.exp(beta * tl.log(logarithm))
    tl.store(out_ptr + offset, result.to(out_ptr.dtype.element_ty), mask=inside)


def _run(
    confidence: Tensor, threshold: Tensor, gradient: Tensor | None, out: Tensor, alpha: float, beta: float
) -> None:
    read, of_gradient = four_axes(confidence), four_axes(confidence if gradient is None else gradient)
    chosen = configure("perplexity", out.numel(), out.device)
    launch(
        _perplexity_kernel,
        (ceil_div(out.numel(), chosen.blocks["BLOCK"]),),
        chosen,
        confidence_ptr=read,
        threshold_ptr=threshold,
        gradient_ptr=of_gradient,
        out_ptr=out,
        size=out.numel(),
        **dict(zip(("n1", "n2", "n3"), read.shape[1:], strict=True)),
        **strides("stride", read),
        **strides("gradient_stride", of_gradient),
        alpha=alpha,
        beta=beta,
        BACKWARD=gradient is not None,
    )


@torch.library.custom_op("cosa_fast::perplexity", mutates_args=())
def _forward(confidence: Tensor, threshold: Tensor, alpha: float, beta: float) -> Tensor:
    out = torch.empty(confidence.shape, dtype=torch.float32, device=confidence.device)
    _run(confidence, threshold, None, out, alpha, beta)
    return out


@torch.library.custom_op("cosa_fast::perplexity_backward", mutates_args=())
def _backward(gradient: Tensor, confidence: Tensor, threshold: Tensor, alpha: float, beta: float) -> Tensor:
    out = torch.empty(confidence.shape, dtype=confidence.dtype, device=confidence.device)
    _run(confidence, threshold, gradient, out, alpha, beta)
    return out


@_forward.register_fake
def _(confidence: Tensor, threshold: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.empty(confidence.shape, dtype=torch.float32, device=confidence.device)


@_backward.register_fake
def _(gradient: Tensor, confidence: Tensor, threshold: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.empty(confidence.shape, dtype=confidence.dtype, device=confidence.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    confidence, threshold, ctx.alpha, ctx.beta = inputs
    ctx.save_for_backward(confidence, threshold)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return _backward(gradient, *ctx.saved_tensors, ctx.alpha, ctx.beta), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def perplexity(
    confidence: Tensor, threshold: float | Tensor, alpha: float = 0.8, beta: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """Perplexity of CAM confidences (eq. 4): P = [−log(α·d)]^β, high near the threshold.

    d = (ν − ξ)/(1 − ξ) where ν ≥ ξ and (ξ − ν)/ξ below, kept in [1e-4, 1]; so P is in [(−log α)^β, (−log 1e-4·α)^β].

    Args:
        confidence: ν in [0, 1], any shape.
        threshold: ξ strictly inside (0, 1); float, or 0-d tensor: its value is not read back but kept inside
            [1e-6, 1 − 1e-6].
        alpha: λα strictly inside (0, 1).
        beta: λβ ≥ 0; 0 gives P = 1 everywhere.

    Raises:
        ValueError: a parameter out of its range, wrong dtype or shape.
    """
    if not isinstance(confidence, Tensor) or not confidence.is_floating_point():
        came = f"dtype {confidence.dtype}" if isinstance(confidence, Tensor) else type(confidence).__name__
        raise fail("confidence", came, "a floating-point tensor")
    check_threshold(threshold)
    check_perplexity(alpha, beta)
    if use_triton(backend, confidence):
        return _forward(confidence, scalar_on(confidence.device, threshold), float(alpha), float(beta))
    return reference.perplexity(confidence, threshold, alpha, beta)
