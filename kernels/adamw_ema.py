"""The optimiser step with the EMA of the assignment network (METHOD section 6)."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .validation import TensorChecks, check_number, fail


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
    backend: str = "auto",
) -> None:
    """One AdamW step (decoupled decay), then the EMA of the new weights Θ' ← mΘ' + (1−m)Θ; all in place.

    Args:
        parameters, exp_avg, exp_avg_sq, ema: (n,) float32 buffers, updated.
        gradients: (n,) of any float dtype, not changed.
        step: () integer tensor of the steps done so far; counted up inside.
        lr: learning rate; float or 0-d tensor. The rate of an element is lr·lr_multiplier.
        lr_multiplier, weight_decay: float, 0-d tensor or (n,) tensor.
        betas, eps: as in AdamW.
        momentum: m in [0, 1]; float or 0-d tensor.
        parameters_bf16, ema_bf16: (n,) bfloat16 copies of the results, written where given.

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
    reference.adamw_ema_(
        parameters,
        gradients,
        exp_avg,
        exp_avg_sq,
        ema,
        step,
        lr,
        lr_multiplier=lr_multiplier,
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        momentum=momentum,
        parameters_bf16=parameters_bf16,
        ema_bf16=ema_bf16,
    )
