"""The optimiser step with the EMA of the assignment network (METHOD section 6), one pass over flat buffers.

With gradient g, t = steps done including this one, η = lr·lr_multiplier, λ = weight_decay:
    m ← m + (1 − β₁)(g − m),  v ← β₂v + (1 − β₂)g²,
    Θ ← Θ − ηλΘ − η·(m/(1 − β₁ᵗ)) / (√(v/(1 − β₂ᵗ)) + ε),
    Θ' ← Θ' + (1 − momentum)(Θ − Θ').
No backward. Five (n,) float32 buffers are read and four written, once each: 20 + 16 bytes per element, 2 fewer with
16-bit gradients, 2 more per bfloat16 copy; arithmetic is nothing beside that. So: one program per block of elements,
vector loads where the buffers start at multiples of 16 bytes. Multiplier and decay are one number each, or one per
element, which costs 4 bytes more. `step` is counted up by a launch before: every program reads the same t. With
`enabled` False nothing is read, written or counted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .launch.runtime import ceil_div, configure, launch, tl, triton_jit, use_triton
from .validation import TensorChecks, check_number, fail


@triton_jit
def _option(pointer, offset, stride, inside, PER_ELEMENT: tl.constexpr):
    """A multiplier or decay: one number, or that of each element."""
    value = tl.load(pointer + offset * stride, mask=inside, other=0.0) if PER_ELEMENT else tl.load(pointer)
    return value.to(tl.float32)


@triton_jit
def _bias_correction(steps, LOG_BETA: tl.constexpr):
    """1 − βᵗ. It starts at 1e-3 for β₂: taken in float64, as float32 would lose four digits of it."""
    power = tl.exp(steps.to(tl.float64) * tl.full((), LOG_BETA, tl.float64))
    return (1.0 - power).to(tl.float32)


@triton_jit
def _adamw_ema_kernel(
    parameters_ptr,  # (n,) float32, updated: Θ
    gradients_ptr,  # (n,) any float: g
    exp_avg_ptr,  # (n,) float32, updated: m
    exp_avg_sq_ptr,  # (n,) float32, updated: v
    ema_ptr,  # (n,) float32, updated: Θ'
    parameters_bf16_ptr,  # (n,) bfloat16, written: copy of Θ; None: not wanted
    ema_bf16_ptr,  # (n,) bfloat16, written: copy of Θ'; None: not wanted
    step_ptr,  # () integer: t, this step included
    lr_ptr,  # () any float
    multiplier_ptr,  # () any float, or (n,) with MULTIPLIERS
    decay_ptr,  # () any float, or (n,) with DECAYS
    momentum_ptr,  # () any float
    enabled_ptr,  # () bool: whether anything happens; None: it does
    size,
    parameters_stride, gradients_stride, exp_avg_stride, exp_avg_sq_stride, ema_stride,
    parameters_bf16_stride, ema_bf16_stride, multiplier_stride, decay_stride,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    MULTIPLIERS: tl.constexpr,
    DECAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    if enabled_ptr is not None:
        inside &= tl.load(enabled_ptr) != 0  # what is masked out moves no bytes
    gradient = tl.load(gradients_ptr + offset * gradients_stride, mask=inside, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offset * exp_avg_stride, mask=inside, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offset * exp_avg_sq_stride, mask=inside, other=0.0).to(tl.float32)
    parameter = tl.load(parameters_ptr + offset * parameters_stride, mask=inside, other=0.0).to(tl.float32)
    ema = tl.load(ema_ptr + offset * ema_stride, mask=inside, other=0.0).to(tl.float32)

    lr = tl.load(lr_ptr).to(tl.float32)
    rate = lr * _option(multiplier_ptr, offset, multiplier_stride, inside, MULTIPLIERS)
    decay = _option(decay_ptr, offset, decay_stride, inside, DECAYS)
    steps = tl.load(step_ptr)
    # 1 − 0.9994 taken in float32 would be off by 5e-5 of itself.
    follow = (1.0 - tl.load(momentum_ptr).to(tl.float64)).to(tl.float32)

    exp_avg += (1.0 - BETA1) * (gradient - exp_avg)
    exp_avg_sq = BETA2 * exp_avg_sq + (1.0 - BETA2) * gradient * gradient
    denominator = tl.sqrt_rn(tl.div_rn(exp_avg_sq, _bias_correction(steps, LOG_BETA2))) + eps
    direction = tl.div_rn(exp_avg, _bias_correction(steps, LOG_BETA1))
    parameter -= rate * decay * parameter
    parameter -= tl.div_rn(rate * direction, denominator)
    ema += follow * (parameter - ema)

    tl.store(exp_avg_ptr + offset * exp_avg_stride, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + offset * exp_avg_sq_stride, exp_avg_sq, mask=inside)
    tl.store(parameters_ptr + offset * parameters_stride, parameter, mask=inside)
    tl.store(ema_ptr + offset * ema_stride, ema, mask=inside)
    if parameters_bf16_ptr is not None:
        tl.store(parameters_bf16_ptr + offset * parameters_bf16_stride, parameter.to(tl.bfloat16), mask=inside)
    if ema_bf16_ptr is not None:
        tl.store(ema_bf16_ptr + offset * ema_bf16_stride, ema.to(tl.bfloat16), mask=inside)


def _update(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: Tensor,
    lr: Tensor,
    multiplier: Tensor,
    decay: Tensor,
    momentum: Tensor,
    parameters_bf16: Tensor | None,
    ema_bf16: Tensor | None,
    enabled: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    step += 1 if enabled is None else enabled
    buffers: dict[str, Tensor | None] = {
        "parameters": parameters,
        "gradients": gradients,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "ema": ema,
        "parameters_bf16": parameters_bf16,
        "ema_bf16": ema_bf16,
        "multiplier": multiplier,
        "decay": decay,
    }
    chosen = configure("adamw_ema", len(parameters), parameters.device)
    launch(
        _adamw_ema_kernel,
        (ceil_div(len(parameters), chosen.blocks["BLOCK"]),),
        chosen,
        **{f"{name}_ptr": buffer for name, buffer in buffers.items()},
        **{f"{name}_stride": _stride(buffer) for name, buffer in buffers.items()},
        step_ptr=step,
        lr_ptr=lr,
        momentum_ptr=momentum,
        enabled_ptr=enabled,
        size=len(parameters),
        eps=eps,
        BETA1=beta1,
        BETA2=beta2,
        LOG_BETA1=_logarithm(beta1),
        LOG_BETA2=_logarithm(beta2),
        MULTIPLIERS=multiplier.ndim == 1,
        DECAYS=decay.ndim == 1,
    )


def _stride(buffer: Tensor | None) -> int:
    return buffer.stride(0) if buffer is not None and buffer.ndim else 0


def _logarithm(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e5  # e^-1e5 is 0


def _number_on(device: torch.device, value: float | Tensor) -> Tensor:
    """A number as a 0-d float64 tensor, filled on the device; tensors stay as they are."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)


_operator = torch.library.custom_op(
    "cosa_fast::adamw_ema_",
    _update,
    mutates_args=("parameters", "exp_avg", "exp_avg_sq", "ema", "step", "parameters_bf16", "ema_bf16"),
)
_operator.register_fake(lambda *_: None)


@torch.no_grad()
def adamw_ema_(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: Tensor,
    lr: float | Tensor,
    *,
    lr_multiplier: float | Tensor = 1.0,
    weight_decay: float | Tensor = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float | Tensor,
    parameters_bf16: Tensor | None = None,
    ema_bf16: Tensor | None = None,
    enabled: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One AdamW step (decoupled decay), then the EMA of the new weights Θ' ← mΘ' + (1−m)Θ; all in place.

    Args:
        parameters, exp_avg, exp_avg_sq, ema: (n,) float32 buffers, updated.
        gradients: (n,) of any float dtype, not changed.
        step: () integer tensor of the steps done so far; counted up inside.
        lr: learning rate; float or 0-d tensor. The rate of an element is lr·lr_multiplier.
        lr_multiplier, weight_decay: float, 0-d tensor, or (n,) tensor with a value for each element.
        betas, eps: as in AdamW.
        momentum: m in [0, 1]; float or 0-d tensor (in float64, 1 − m keeps its digits).
        parameters_bf16, ema_bf16: (n,) bfloat16 copies of the results, written where given.
        enabled: () bool tensor; where it holds False nothing is updated, written or counted, whatever the gradients.

    Raises:
        ValueError: wrong shape, dtype or device; a parameter out of its range.
    """
    checks = TensorChecks()
    for name, buffer in {"parameters": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}.items():
        checks.check(name, buffer, "n", "float32")
    checks.check("gradients", gradients, "n")
    checks.check("step", step, "", "integer")
    checks.check_optional("parameters_bf16", parameters_bf16, "n", "bfloat16")
    checks.check_optional("ema_bf16", ema_bf16, "n", "bfloat16")
    checks.check_optional("enabled", enabled, "", "bool")
    for name, value in {"lr": lr, "lr_multiplier": lr_multiplier, "weight_decay": weight_decay}.items():
        if not isinstance(value, Tensor):
            check_number(name, value, 0)
        elif value.ndim == 0 or name == "lr":
            checks.check(name, value, "")
        else:
            checks.check(name, value, "n")
    if isinstance(momentum, Tensor):
        checks.check("momentum", momentum, "")
    else:
        check_number("momentum", momentum, 0, 1)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise fail("betas", repr(betas), "two numbers (β₁, β₂)")
    for beta in betas:
        check_number("betas", beta, 0, 1, open_high=True)
    check_number("eps", eps, 0)
    buffers = (parameters, gradients, exp_avg, exp_avg_sq, ema, step)
    optional = (parameters_bf16, ema_bf16, enabled)
    constants = (float(betas[0]), float(betas[1]), float(eps))
    if use_triton(backend, parameters):
        numbers = (_number_on(parameters.device, value) for value in (lr, lr_multiplier, weight_decay, momentum))
        _operator(*buffers, *numbers, *optional, *constants)
    else:
        reference.adamw_ema_(*buffers, lr, lr_multiplier, weight_decay, momentum, *optional, *constants)
