"""The optimiser kernel against torch.optim.AdamW in float64, a step by hand, and the definition."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import assert_fullgraph, assert_no_copies, assert_three_way
from torch import Tensor

from cosa_fast.kernels import adamw_ema_
from cosa_fast.kernels.adamw_ema import _run, _update

BUFFERS = ("parameters", "exp_avg", "exp_avg_sq", "ema")


def state_of(length: int, device: torch.device | str = "cpu", steps: int = 7, seed: int = 0) -> dict[str, Any]:
    """Buffers in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(length, generator=generator) for name in BUFFERS}
    values["exp_avg_sq"].square_()
    return {name: value.to(device) for name, value in values.items()} | {"step": torch.tensor(steps, device=device)}


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


def assert_as_exact(found: dict[str, Any], plain: dict[str, Any], truth: dict[str, Tensor], where: str = "") -> None:
    for name in BUFFERS:
        assert_three_way(found[name], plain[name], truth[name], 3e-7, f"{name} {where}")


@pytest.mark.parametrize("steps", [0, 1, 12, 1000, 2**33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_step_is_as_exact_as_plain_pytorch(kernel_device: torch.device, dtype: torch.dtype, steps: int) -> None:
    start, gradients = state_of(1500, kernel_device, steps), gradients_of(1500, dtype, kernel_device)
    found, plain = copied(start), copied(start)
    for backend, state in (("triton", found), ("reference", plain)):
        adamw_ema_(gradients=gradients, lr=1e-3, weight_decay=0.05, momentum=0.9994, backend=backend, **state)
    truth = step_by_hand(start, gradients, 1e-3, 1.0, 0.05, 0.9994)
    assert_as_exact(found, plain, truth)
    assert found["step"].item() == steps + 1


def test_follows_adamw_and_the_ema_over_a_thousand_steps(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    length, device = 40, kernel_device
    found = state_of(length, device, steps=0)
    found["exp_avg"].zero_()
    found["exp_avg_sq"].zero_()
    plain, ema = copied(found), found["ema"].double()
    leaf = found["parameters"].double().requires_grad_()
    optimizer = torch.optim.AdamW([leaf], lr=1e-3, betas=(0.9, 0.99), eps=1e-7, weight_decay=0.05)
    for index in range(1000):
        gradients, lr = torch.randn(length, device=device), torch.tensor(1e-3 * (1 - index / 1000), device=device)
        leaf.grad, optimizer.param_groups[0]["lr"] = gradients.double(), float(lr)
        optimizer.step()
        ema.lerp_(leaf.detach(), 1 - 0.9994)
        for backend, state in (("triton", found), ("reference", plain)):
            adamw_ema_(
                gradients=gradients, lr=lr, weight_decay=0.05, betas=(0.9, 0.99), eps=1e-7, momentum=0.9994,
                backend=backend, **state,
            )  # fmt: skip
    assert found["step"].item() == 1000
    for name, truth in (("parameters", leaf), ("ema", ema)):
        assert_three_way(found[name], plain[name], truth, 1e-6, name)


@settings(max_examples=8, deadline=None)
@given(
    length=st.one_of(st.integers(1, 5), st.integers(1020, 2050)),
    cuts=st.lists(st.floats(0, 1), min_size=0, max_size=5),
    grouped=st.sampled_from(["multiplier", "decay", "both"]),
)
def test_any_groups(length: int, cuts: list[float], grouped: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ends = torch.tensor([*sorted(int(cut * length) for cut in cuts), length], device=device)
    table = torch.rand(len(ends), generator=torch.Generator().manual_seed(1)).to(device)
    sizes = ends.diff(prepend=torch.zeros(1, dtype=torch.int64, device=device))
    per_element = table.repeat_interleave(sizes)
    # By group, and the same by element.
    multipliers = (table, per_element) if grouped != "decay" else (0.5, 0.5)
    decays = (2 * table, 2 * per_element) if grouped != "multiplier" else (0.1, 0.1)
    start, gradients = state_of(length, device), gradients_of(length, device=device)
    found, plain = copied(start), copied(start)
    for backend, state in (("triton", found), ("reference", plain)):
        adamw_ema_(
            gradients=gradients, lr=0.1, lr_multiplier=multipliers[0], weight_decay=decays[0], momentum=0.9,
            segments=ends, backend=backend, **state,
        )  # fmt: skip
    assert_as_exact(found, plain, step_by_hand(start, gradients, 0.1, multipliers[1], decays[1], 0.9))


def test_sixty_four_groups_some_empty(kernel_device: torch.device) -> None:
    ends = torch.arange(1, 65, device=kernel_device) * 20
    ends[10:13] = ends[13].clone()  # groups 11, 12 and 13 have no element
    table = torch.linspace(0, 2, 64, device=kernel_device)
    start, gradients = state_of(1280, kernel_device), gradients_of(1280, device=kernel_device)
    by_group, by_element = copied(start), copied(start)
    options = {"gradients": gradients, "lr": 0.1, "momentum": 0.9, "backend": "triton"}
    adamw_ema_(**by_group, **options, lr_multiplier=table, weight_decay=table.bfloat16(), segments=ends)
    index = (ends[None] <= torch.arange(1280, device=kernel_device)[:, None]).sum(1)
    adamw_ema_(**by_element, **options, lr_multiplier=table[index], weight_decay=table.bfloat16()[index])
    for name in BUFFERS:
        assert torch.equal(by_group[name], by_element[name]), name


def test_slices_at_any_offset_and_step_are_updated_in_place(kernel_device: torch.device, poisoned: None) -> None:
    start = state_of(37, kernel_device)
    gradients = gradients_of(37, torch.bfloat16, kernel_device)
    options = {"lr": 0.1, "momentum": 0.9, "backend": "triton"}
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


def arguments_of(state: dict[str, Any], gradients: Tensor, **optional: Tensor) -> tuple[Any, ...]:
    """The operator's arguments, in order."""
    numbers = [torch.full((), value, device=gradients.device) for value in (0.1, 1.0, 0.01, 0.9)]
    copies = [optional.get(name) for name in ("segments", "parameters_bf16", "ema_bf16", "enabled")]
    buffers = [state[name] for name in BUFFERS]
    return (buffers[0], gradients, *buffers[1:], state["step"], *numbers, *copies, 0.9, 0.999, 1e-8)


def test_nothing_is_copied_or_read_back(kernel_device: torch.device) -> None:
    larger, gradients = state_of(80, kernel_device), gradients_of(37, torch.float16, kernel_device)
    views = {name: value[3:40] if value.ndim else value for name, value in larger.items()}
    segments = torch.tensor([10, 37], device=kernel_device)
    assert_no_copies(lambda: _run(*arguments_of(views, gradients, segments=segments)))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_disabled_steps_change_nothing_whatever_the_gradients(kernel_device: torch.device, backend: str) -> None:
    start = state_of(37, kernel_device)
    enabled = torch.tensor(True, device=kernel_device)
    plain, state = copied(start), copied(start)
    copies = [torch.zeros(37, dtype=torch.bfloat16, device=kernel_device) for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "backend": backend}
    gradients = gradients_of(37, device=kernel_device)
    adamw_ema_(gradients=gradients, **options, **plain)
    adamw_ema_(
        gradients=gradients, enabled=enabled, parameters_bf16=copies[0], ema_bf16=copies[1], **options, **state
    )  # fmt: skip
    written = [copy.clone() for copy in copies]
    bad = torch.full((37,), torch.nan, device=kernel_device)
    adamw_ema_(
        gradients=bad, enabled=~enabled, parameters_bf16=copies[0], ema_bf16=copies[1], **options, **state
    )  # fmt: skip
    assert all(torch.equal(state[name], plain[name]) for name in state)
    assert all(torch.equal(copy, kept) for copy, kept in zip(copies, written, strict=True))
    torch.testing.assert_close(copies[0].float(), plain["parameters"], rtol=2**-7, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.999999])
def test_extreme_betas(kernel_device: torch.device, beta: float) -> None:
    start, gradients = state_of(9, kernel_device), gradients_of(9, device=kernel_device)
    found, plain = copied(start), copied(start)
    for backend, state in (("triton", found), ("reference", plain)):
        adamw_ema_(gradients=gradients, lr=0.1, betas=(beta, beta), momentum=0.5, backend=backend, **state)
    assert_as_exact(found, plain, step_by_hand(start, gradients, 0.1, 1.0, 0.01, 0.5, (beta, beta)))


def test_huge_and_zero_gradients_stay_finite(kernel_device: torch.device) -> None:
    gradients = torch.tensor([1e15, -1e15, 0.0, 1e-20], device=kernel_device)
    state = {name: torch.zeros(4, device=kernel_device) for name in BUFFERS}
    step = torch.zeros((), dtype=torch.int32, device=kernel_device)
    adamw_ema_(gradients=gradients, lr=0.1, momentum=0.0, backend="triton", step=step, **state)
    expected = torch.tensor([-0.1, 0.1, 0.0, 0.0], device=kernel_device)
    torch.testing.assert_close(state["parameters"], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(state["ema"], state["parameters"])
    assert step.item() == 1


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_zero_follows_and_one_stands_still(kernel_device: torch.device, momentum: float) -> None:
    state = state_of(5, kernel_device)
    start = state["ema"].clone()
    rate = torch.tensor(momentum, device=kernel_device)
    adamw_ema_(gradients=gradients_of(5, device=kernel_device), lr=0.1, momentum=rate, backend="triton", **state)
    torch.testing.assert_close(state["ema"], start if momentum else state["parameters"], atol=3e-7, rtol=0)


def test_one_minus_momentum_keeps_its_digits(kernel_device: torch.device) -> None:
    state = state_of(5, kernel_device)
    state["ema"].zero_()
    adamw_ema_(gradients=torch.zeros(5, device=kernel_device), lr=0.1, momentum=0.9994, backend="triton", **state)
    torch.testing.assert_close(state["ema"], 6e-4 * state["parameters"], rtol=5e-7, atol=0)


def test_leaf_parameters_are_updated_without_a_graph(kernel_device: torch.device) -> None:
    state = state_of(4, kernel_device)
    before = state["parameters"].clone()
    state["parameters"].requires_grad_()
    adamw_ema_(gradients=torch.ones(4, device=kernel_device), lr=0.1, momentum=0.9, backend="triton", **state)
    assert not torch.equal(state["parameters"], before)
    assert state["parameters"].is_leaf
    assert not state["ema"].requires_grad


def test_more_than_sixty_four_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^segments: got 65 groups, want at most 64"):
        adamw_ema_(gradients=torch.ones(4), lr=0.1, momentum=0.9, segments=torch.full((65,), 4), **state_of(4))


def test_with_groups_there_is_one_option_per_group() -> None:
    options = {"gradients": torch.ones(4), "lr": 0.1, "momentum": 0.9, "segments": torch.tensor([2, 4])}
    with pytest.raises(ValueError, match=r"^lr_multiplier: got shape \(4,\), want .*\(G\) with G = 2"):
        adamw_ema_(lr_multiplier=torch.ones(4), **options, **state_of(4))


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


def test_registration(kernel_device: torch.device) -> None:
    state, gradients = state_of(9, kernel_device), gradients_of(9, device=kernel_device)
    copies = {name: torch.zeros(9, dtype=torch.bfloat16, device=kernel_device) for name in ("parameters_bf16",)}
    segments = torch.tensor([4, 9], device=kernel_device)
    torch.library.opcheck(_update, arguments_of(state, gradients, segments=segments, **copies))

    def step(parameters: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        fresh = {name: value.clone() for name, value in state.items()} | {"parameters": parameters.clone()}
        adamw_ema_(gradients=gradients, lr=0.1, momentum=0.9, backend="triton", **fresh)
        return fresh["parameters"], fresh["ema"]

    assert_fullgraph(step, state["parameters"], gradients)
