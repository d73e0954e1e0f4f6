"""adamw_ema_ against torch.optim.AdamW and a step by hand in float64, by both back-ends."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, assert_fullgraph, assert_no_copies, assert_three_way
from torch import Tensor

from cosa_fast.kernels import adamw_ema_
from cosa_fast.kernels.adamw_ema import _operator, _update

BUFFERS = ("parameters", "exp_avg", "exp_avg_sq", "ema")


def state_of(length: int, device: torch.device | str = "cpu", steps: int = 7, seed: int = 0) -> dict[str, Any]:
    """Buffers in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(length, generator=generator) for name in BUFFERS}
    values["exp_avg_sq"].square_()
    return {name: value.to(device) for name, value in values.items()} | {"step": torch.tensor(steps, device=device)}


def fresh_state(length: int, device: torch.device) -> dict[str, Any]:
    """Buffers before the first step."""
    state = state_of(length, device, steps=0)
    state["exp_avg"].zero_()
    state["exp_avg_sq"].zero_()
    state["ema"].copy_(state["parameters"])
    return state


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in state.items()}


def gradients_of(length: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(99)).to(device, dtype)


def step_by_hand(
    state: dict[str, Any], gradients: Tensor, lr: float, multiplier: Any, decay: Any, momentum: float,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
) -> dict[str, Tensor]:  # fmt: skip
    """The state after one step, in float64."""
    parameters, exp_avg, exp_avg_sq, ema = (state[name].double() for name in BUFFERS)
    gradients, steps = gradients.double(), int(state["step"]) + 1
    multiplier, decay = (torch.as_tensor(option, device=ema.device).double() for option in (multiplier, decay))
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * gradients
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * gradients.square()
    corrected = exp_avg / (1 - betas[0] ** steps)
    denominator = (exp_avg_sq / (1 - betas[1] ** steps)).sqrt() + eps
    parameters = parameters * (1 - lr * multiplier * decay) - lr * multiplier * corrected / denominator
    ema = momentum * ema + (1 - momentum) * parameters
    return dict(zip(BUFFERS, (parameters, exp_avg, exp_avg_sq, ema), strict=True))


def assert_exact(
    start: dict[str, Any], gradients: Tensor, *, multiplier: Any = 1.0, decay: Any = 0.05,
    betas: tuple[float, float] = (0.9, 0.999), momentum: float = 0.9994,
) -> None:  # fmt: skip
    """A step of the kernel is as exact as one of plain PyTorch."""
    found, plain = copied(start), copied(start)
    for backend, state in (("triton", found), ("reference", plain)):
        adamw_ema_(
            gradients=gradients, lr=1e-3, lr_multiplier=multiplier, weight_decay=decay, betas=betas, momentum=momentum,
            backend=backend, **state,
        )  # fmt: skip
    truth = step_by_hand(start, gradients, 1e-3, multiplier, decay, momentum, betas)
    for name in BUFFERS:
        assert_three_way(found[name], plain[name], truth[name], 3e-7, name)
    assert found["step"] == plain["step"] == start["step"] + 1


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [(torch.float32, 0), (torch.float32, 2**33), (torch.float16, 1), (torch.bfloat16, 12), (torch.float32, 1000)],
)
def test_a_step_is_as_exact_as_plain_pytorch(kernel_device: torch.device, dtype: torch.dtype, steps: int) -> None:
    assert_exact(state_of(1500, kernel_device, steps), gradients_of(1500, dtype, kernel_device))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.999999])
def test_extreme_betas(kernel_device: torch.device, beta: float) -> None:
    assert_exact(state_of(9, kernel_device), gradients_of(9, device=kernel_device), betas=(beta, beta), momentum=0.5)


@settings(max_examples=6, deadline=None)
@given(
    length=st.one_of(st.integers(1, 5), st.integers(1020, 2050)),
    each=st.sampled_from(["multiplier", "decay", "both"]),
)
def test_every_element_may_have_its_rate_and_decay(length: int, each: str) -> None:
    rates = torch.rand(2 * length, generator=torch.Generator().manual_seed(1)).to(DEVICE)[::2]
    multiplier: Any = rates if each != "decay" else 0.5
    decay: Any = (2 * rates).bfloat16() if each != "multiplier" else 0.1
    assert_exact(
        state_of(length, DEVICE), gradients_of(length, device=DEVICE), multiplier=multiplier, decay=decay
    )  # fmt: skip


# The interpreter takes its time for a launch, and the definition has shown that errors do not pile up.
@pytest.mark.parametrize(("backend", "steps"), [("reference", 1000), ("triton", 40)])
def test_equals_adamw_and_the_ema_step_after_step(kernel_device: torch.device, backend: str, steps: int) -> None:
    torch.manual_seed(0)
    state = fresh_state(60, kernel_device)
    body, heads = (state["parameters"][part].double().requires_grad_() for part in (slice(0, 37), slice(37, None)))
    ema = state["ema"].double()
    groups = [{"params": [body], "weight_decay": 0.05}, {"params": [heads], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-7)
    multiplier, decay = torch.ones(60, device=kernel_device), torch.full((60,), 0.05, device=kernel_device)
    multiplier[37:], decay[37:] = 10.0, 0.0
    for index in range(steps):
        gradients = torch.randn(60, device=kernel_device) + 0.3 * state["parameters"]
        lr = torch.tensor(1e-3 * (1 - index / steps), device=kernel_device)
        body.grad, heads.grad = gradients[:37].double(), gradients[37:].double()
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = float(lr), 10 * float(lr)
        optimizer.step()
        ema.lerp_(torch.cat((body, heads)).detach(), 1 - 0.9994)
        adamw_ema_(
            gradients=gradients, lr=lr, lr_multiplier=multiplier, weight_decay=decay, betas=(0.9, 0.99), eps=1e-7,
            momentum=0.9994, backend=backend, **state,
        )  # fmt: skip
    assert state["step"].item() == steps
    truth = torch.cat((body, heads)).detach().float()
    torch.testing.assert_close(state["parameters"], truth, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(state["ema"], ema.float(), atol=5e-6, rtol=1e-5)


def test_first_step_by_hand(kernel_device: torch.device, backend: str) -> None:
    """The bias-corrected m/√v is the sign of the gradient, however large that is."""
    state = fresh_state(5, kernel_device)
    start = state["parameters"].clone()
    gradients = torch.tensor([2.0, -1e15, 1e15, 1e-20, 0.0], device=kernel_device)
    kept = gradients.clone()
    adamw_ema_(gradients=gradients, lr=0.1, weight_decay=0.5, momentum=0.75, backend=backend, **state)
    expected = start * 0.95 - 0.1 * torch.tensor([1.0, -1.0, 1.0, 0.0, 0.0], device=kernel_device)
    torch.testing.assert_close(state["parameters"], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state["ema"], 0.75 * start + 0.25 * expected)
    assert torch.equal(gradients, kept)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_zero_follows_and_one_stands_still(kernel_device: torch.device, backend: str, momentum: float) -> None:
    state = state_of(5, kernel_device)
    start = state["ema"].clone()
    rate = torch.tensor(momentum, device=kernel_device)
    adamw_ema_(gradients=gradients_of(5, device=kernel_device), lr=0.1, momentum=rate, backend=backend, **state)
    torch.testing.assert_close(state["ema"], start if momentum else state["parameters"], atol=3e-7, rtol=0)


def test_one_minus_momentum_keeps_its_digits(kernel_device: torch.device, backend: str) -> None:
    state = state_of(5, kernel_device)
    state["ema"].zero_()
    adamw_ema_(gradients=torch.zeros(5, device=kernel_device), lr=0.1, momentum=0.9994, backend=backend, **state)
    torch.testing.assert_close(state["ema"], 6e-4 * state["parameters"], rtol=5e-7, atol=0)


def test_small_ema_increments_survive() -> None:
    state = fresh_state(4, torch.device("cpu"))
    state["ema"].fill_(1.0)
    state["parameters"].fill_(1.001)
    for _ in range(100):
        adamw_ema_(gradients=torch.zeros(4), lr=0.0, momentum=0.9994, **state)
    torch.testing.assert_close(state["ema"], torch.full((4,), 1.001 - 0.001 * 0.9994**100), atol=5e-6, rtol=0)


def test_leaf_parameters_are_updated_without_a_graph(kernel_device: torch.device, backend: str) -> None:
    state = state_of(4, kernel_device)
    before = state["parameters"].clone()
    state["parameters"].requires_grad_()
    adamw_ema_(gradients=torch.ones(4, device=kernel_device), lr=0.1, momentum=0.9, backend=backend, **state)
    assert not torch.equal(state["parameters"], before)
    assert state["parameters"].is_leaf
    assert not state["ema"].requires_grad


def test_slices_at_any_offset_and_step_are_updated_in_place(
    kernel_device: torch.device, backend: str, poisoned: None
) -> None:
    start = state_of(37, kernel_device)
    gradients = gradients_of(37, torch.bfloat16, kernel_device)
    options = {"lr": 0.1, "momentum": 0.9, "backend": backend}
    expected = copied(start)
    copies = {name: torch.empty(37, dtype=torch.bfloat16, device=kernel_device) for name in BUFFERS[::3]}
    named = {f"{name}_bf16": copy for name, copy in copies.items()}
    adamw_ema_(gradients=gradients, **options, **expected, **named)
    for name, copy in copies.items():
        gap = (copy.double() - expected[name].double()).abs()
        assert (gap <= expected[name].double().abs() * 2.0**-7).all()
    for part in (slice(3, 40), slice(5, 79, 2)):
        larger = {name: torch.full((80,), 7.0, device=kernel_device) for name in (*BUFFERS, *named)}
        larger = {name: value.bfloat16() if name in named else value for name, value in larger.items()}
        views: dict[str, Any] = {name: value[part] for name, value in larger.items()}
        for name in BUFFERS:
            views[name].copy_(start[name])
        spread = torch.zeros(80, dtype=torch.bfloat16, device=kernel_device)
        spread[part] = gradients
        adamw_ema_(gradients=spread[part], step=start["step"].clone(), **options, **views)
        for name in BUFFERS:
            assert torch.equal(views[name], expected[name]), name
        for name, copy in named.items():
            assert torch.equal(views[name], copy), name
        outside = torch.ones(80, dtype=torch.bool, device=kernel_device)
        outside[part] = False
        assert all((value[outside] == 7).all() for value in larger.values()), "written beside the view"
    assert torch.equal(gradients, gradients_of(37, torch.bfloat16, kernel_device))


def test_disabled_steps_change_nothing_whatever_the_gradients(kernel_device: torch.device, backend: str) -> None:
    start = state_of(37, kernel_device)
    enabled = torch.tensor(True, device=kernel_device)
    plain, state = copied(start), copied(start)
    copies = {
        name: torch.zeros(37, dtype=torch.bfloat16, device=kernel_device) for name in ("parameters_bf16", "ema_bf16")
    }
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "backend": backend}
    gradients = gradients_of(37, device=kernel_device)
    adamw_ema_(gradients=gradients, **options, **plain)
    adamw_ema_(gradients=gradients, enabled=enabled, **copies, **options, **state)
    written = copied(copies)
    bad = torch.full((37,), torch.nan, device=kernel_device)
    adamw_ema_(gradients=bad, enabled=~enabled, **copies, **options, **state)
    assert all(torch.equal(state[name], plain[name]) for name in state)
    assert all(torch.equal(copies[name], written[name]) for name in copies)
    torch.testing.assert_close(copies["parameters_bf16"].float(), plain["parameters"], rtol=2**-7, atol=0)


def test_repeated_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    start, gradients = state_of(2100, kernel_device), gradients_of(2100, device=kernel_device)
    first, second = copied(start), copied(start)
    for state in (first, second):
        adamw_ema_(gradients=gradients, lr=0.1, momentum=0.9, backend="triton", **state)
    assert all(torch.equal(first[name], second[name]) for name in BUFFERS)


def test_offsets_beyond_two_to_the_31_elements(kernel_device: torch.device) -> None:
    spacing = 2**30  # the third element lies 2^31 elements after the first; only touched pages cost memory
    memory = torch.empty(2 * spacing + len(BUFFERS), device=kernel_device)
    start, gradients = state_of(3, kernel_device), gradients_of(3, device=kernel_device)
    views = {name: memory.as_strided((3,), (spacing,), index) for index, name in enumerate(BUFFERS)}
    for name, view in views.items():
        view.copy_(start[name])
    expected = copied(start)
    for state in (expected, views | {"step": start["step"].clone()}):
        adamw_ema_(gradients=gradients, lr=0.1, momentum=0.9, backend="triton", **state)
    assert all(torch.equal(views[name], expected[name]) for name in BUFFERS)


def arguments_of(state: dict[str, Any], gradients: Tensor, copy: Tensor | None = None) -> tuple[Any, ...]:
    """The operator's arguments, in order, with a decay for every element."""
    lr, multiplier, momentum = (torch.full((), value, device=gradients.device) for value in (0.1, 1.0, 0.9))
    buffers = [state[name] for name in BUFFERS]
    numbers = (lr, multiplier, torch.full_like(state["ema"], 0.01), momentum)
    return (buffers[0], gradients, *buffers[1:], state["step"], *numbers, copy, None, None, 0.9, 0.999, 1e-8)


def test_nothing_is_copied_or_read_back(kernel_device: torch.device) -> None:
    larger, gradients = state_of(80, kernel_device), gradients_of(37, torch.float16, kernel_device)
    views = {name: value[3:40] if value.ndim else value for name, value in larger.items()}
    arguments = arguments_of(views, gradients)
    assert_no_copies(lambda: _update(*arguments))


def test_registration(kernel_device: torch.device) -> None:
    state, gradients = state_of(9, kernel_device), gradients_of(9, device=kernel_device)
    copy = torch.zeros(9, dtype=torch.bfloat16, device=kernel_device)
    torch.library.opcheck(_operator, arguments_of(state, gradients, copy))

    def step(parameters: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        fresh = {name: value.clone() for name, value in state.items()} | {"parameters": parameters.clone()}
        adamw_ema_(gradients=gradients, lr=0.1, momentum=0.9, backend="triton", **fresh)
        return fresh["parameters"], fresh["ema"]

    assert_fullgraph(step, state["parameters"], gradients)
