"""AdamW and the EMA of the assignment network (METHOD section 6)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def adamw_ema_(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: Tensor,
    lr: float | Tensor,
    lr_multiplier: float | Tensor,
    weight_decay: float | Tensor,
    momentum: float | Tensor,
    parameters_bf16: Tensor | None,
    ema_bf16: Tensor | None,
    enabled: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One AdamW step with decoupled decay, then Θ' ← mΘ' + (1−m)Θ, in place on flat float32 buffers; nothing where
    `enabled` holds False."""
    gradients = gradients.float()
    # Disabled is a step of rate 0 with gradient 0: cheaper than keeping the old values.
    on: float | Tensor = 1.0
    follow: float | Tensor = 1 - beta1
    decay: float | Tensor = beta2
    if enabled is not None:
        on, gradients = enabled.double(), gradients.where(enabled, 0)
        follow, decay = (on * follow).to(exp_avg.dtype), torch.where(enabled, beta2, 1.0)
    step += 1 if enabled is None else enabled
    exp_avg.lerp_(gradients, follow)
    exp_avg_sq.mul_(decay).addcmul_(gradients, gradients, value=1 - beta2)
    # 1 − β₂^t starts at 1e-3: taken in float64, as float32 would lose four digits of it.
    correction1, correction2 = (1 - beta ** step.double().clamp(min=1) for beta in (beta1, beta2))
    denominator = (exp_avg_sq / correction2).sqrt_().add_(eps)
    rate = lr * lr_multiplier * on
    # Not Θ·(1 − ηλ): 1 − 6e-7 has one digit of ηλ left in float32.
    parameters.sub_(parameters * (rate * weight_decay))
    parameters.sub_(rate * (exp_avg / correction1) / denominator)
    ema.add_((parameters - ema) * ((1 - momentum) * on))
    if parameters_bf16 is not None:
        parameters_bf16.copy_(parameters)
    if ema_bf16 is not None:
        ema_bf16.copy_(ema)
