"""The gated dense-CRF energy (METHOD section 5.5): L = −Σ S·A(S)·gate / B, A as in `bilateral_filter`.

Backward, the method's rule: dL/dS = −2·gate·A(S)/B, the derivative where the gate is constant (A is symmetric: S·A(S)
gives A(S) twice). The filter's kernel stores G = gate·A(S)/B (B, K, h, w) in float32, and the energy's part of every
program; their sum is taken in a fixed order. The backward reads G and writes −2·dL·G: 8 bytes per float32 element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .bilateral_filter import run_filter
from .launch.runtime import ceil_div, configure, launch, tl, triton_jit, use_triton
from .validation import TensorChecks, check_number


@triton_jit
def _backward_kernel(
    gradient_ptr,  # () any float: of the energy
    gated_ptr,  # (size,) float32: gate·A(S)/B
    out_ptr,  # (size,) gradient of S, in the type of S
    size,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    gated = tl.load(gated_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr).to(tl.float32) * -2.0
    tl.store(out_ptr + offset, (gradient * gated).to(out_ptr.dtype.element_ty), mask=inside)


def _run_backward(gradient: Tensor, gated: Tensor, out: Tensor) -> None:
    chosen = configure("dense_energy_backward", out.numel(), out.device)
    grid = (ceil_div(out.numel(), chosen.blocks["BLOCK"]),)
    launch(_backward_kernel, grid, chosen, gradient_ptr=gradient, gated_ptr=gated, out_ptr=out, size=out.numel())


@torch.library.custom_op("cosa_fast::dense_energy", mutates_args=())
def _forward(
    probabilities: Tensor, guide: Tensor, gate: Tensor, sigma_xy: float, sigma_rgb: float
) -> tuple[Tensor, Tensor]:
    gated = torch.empty(probabilities.shape, dtype=torch.float32, device=probabilities.device)
    return run_filter(probabilities, guide, gate, gated, sigma_xy, sigma_rgb).sum(), gated


@torch.library.custom_op("cosa_fast::dense_energy_backward", mutates_args=())
def _backward(gradient: Tensor, gated: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(gated.shape, dtype=dtype, device=gated.device)
    _run_backward(gradient, gated, out)
    return out


@_forward.register_fake
def _(probabilities: Tensor, guide: Tensor, gate: Tensor, sigma_xy: float, sigma_rgb: float) -> tuple[Tensor, Tensor]:
    gated = torch.empty(probabilities.shape, dtype=torch.float32, device=probabilities.device)
    return gated.new_empty(()), gated


@_backward.register_fake
def _(gradient: Tensor, gated: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(gated.shape, dtype=dtype, device=gated.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    (gated,) = ctx.saved_tensors
    return _backward(gradient, gated, ctx.dtype), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


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
    if use_triton(backend, probabilities):
        return _forward(probabilities, guide, gate, float(sigma_xy), float(sigma_rgb))[0]
    return reference.dense_energy(probabilities, guide, gate, sigma_xy, sigma_rgb)
