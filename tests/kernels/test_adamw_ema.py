"""adamw_ema_ against torch.optim.AdamW and a lerp."""

from typing import Any

import pytest
import torch

from cosa_fast.kernels import adamw_ema_


def buffers(length: int) -> dict[str, Any]:
    start = torch.randn(length)
    return {
        "parameters": start.clone(),
        "exp_avg": torch.zeros(length),
        "exp_avg_sq": torch.zeros(length),
        "ema": start.clone(),
        "step": torch.zeros((), dtype=torch.int64),
    }


def test_equals_adamw_with_groups_and_ema_over_a_thousand_steps() -> None:
    torch.manual_seed(0)
    state = buffers(60)
    body, heads = (state["parameters"][part].double().requires_grad_() for part in (slice(0, 37), slice(37, None)))
    ema = state["ema"].double()
    groups = [{"params": [body], "weight_decay": 0.05}, {"params": [heads], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-7)
    multiplier, decay = torch.ones(60), torch.full((60,), 0.05)
    multiplier[37:], decay[37:] = 10.0, 0.0
    copies: dict[str, Any] = {name: torch.empty(60, dtype=torch.bfloat16) for name in ("parameters_bf16", "ema_bf16")}
    for index in range(1000):
        gradient, lr = torch.randn(60) + 0.3 * state["parameters"], 1e-3 * (1 - index / 1000)
        body.grad, heads.grad = gradient[:37].double(), gradient[37:].double()
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, 10 * lr
        optimizer.step()
        ema.lerp_(torch.cat((body, heads)).detach(), 1 - 0.9994)
        adamw_ema_(
            gradients=gradient,
            lr=torch.tensor(lr),
            lr_multiplier=multiplier,
            weight_decay=decay,
            betas=(0.9, 0.99),
            eps=1e-7,
            momentum=0.9994,
            **state,
            **copies,
        )
    assert state["step"].item() == 1000
    truth = torch.cat((body, heads)).detach().float()
    torch.testing.assert_close(state["parameters"], truth, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(state["ema"], ema.float(), atol=5e-6, rtol=1e-5)
    assert torch.equal(copies["parameters_bf16"], state["parameters"].bfloat16())
    assert torch.equal(copies["ema_bf16"], state["ema"].bfloat16())


def test_first_step_by_hand() -> None:
    state = buffers(3)
    start = state["parameters"].clone()
    gradients = torch.tensor([2.0, -3.0, 0.0])
    adamw_ema_(gradients=gradients, lr=0.1, weight_decay=0.5, momentum=0.75, **state)
    expected = start * 0.95 - 0.1 * torch.tensor([1.0, -1.0, 0.0])  # bias-corrected m/√v is the sign
    torch.testing.assert_close(state["parameters"], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state["ema"], 0.75 * start + 0.25 * expected)
    assert gradients.tolist() == [2.0, -3.0, 0.0]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_zero_follows_and_one_stands_still(momentum: float) -> None:
    state = buffers(5)
    start = state["ema"].clone()
    adamw_ema_(gradients=torch.randn(5), lr=0.1, momentum=torch.tensor(momentum), **state)
    torch.testing.assert_close(state["ema"], start if momentum else state["parameters"])


def test_small_ema_increments_survive() -> None:
    state = buffers(4)
    state["ema"].fill_(1.0)
    state["parameters"].fill_(1.001)
    for _ in range(100):
        adamw_ema_(gradients=torch.zeros(4), lr=0.0, momentum=0.9994, **state)
    torch.testing.assert_close(state["ema"], torch.full((4,), 1.001 - 0.001 * 0.9994**100), atol=5e-6, rtol=0)


def test_half_gradients_and_slices_of_larger_buffers() -> None:
    gradients = torch.randn(6).bfloat16()
    whole, parts = buffers(6), buffers(6)
    parts["parameters"].copy_(whole["parameters"])
    parts["ema"].copy_(whole["ema"])
    adamw_ema_(gradients=gradients.float(), lr=0.1, momentum=0.9, **whole)
    for offset in (0, 1):  # every second element: strided views
        step = torch.zeros((), dtype=torch.int32)
        views: dict[str, Any] = {name: value[offset::2] for name, value in parts.items() if name != "step"}
        adamw_ema_(gradients=gradients[offset::2], lr=0.1, momentum=0.9, step=step, **views)
    for name in ("parameters", "exp_avg", "exp_avg_sq", "ema"):
        torch.testing.assert_close(parts[name], whole[name])


def test_leaf_parameters_are_updated_without_a_graph() -> None:
    state = buffers(4)
    state["parameters"].requires_grad_()
    adamw_ema_(gradients=torch.ones(4), lr=0.1, momentum=0.9, **state)
    assert not state["ema"].requires_grad
    assert state["parameters"].is_leaf
