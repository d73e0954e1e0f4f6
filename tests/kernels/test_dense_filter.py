"""bilateral_filter and dense_energy against double loops, the rule of the backward, speed where numbers get tiny."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosa_fast.kernels import bilateral_filter, dense_energy
from cosa_fast.kernels.reference import dense


def filter_by_hand(values: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    batch, _, height, width = values.shape
    result = torch.zeros_like(values)
    places = [(y, x) for y in range(height) for x in range(width)]
    for b in range(batch):
        for y, x in places:
            for v, u in places:
                space = ((y - v) ** 2 + (x - u) ** 2) / sigma_xy**2
                colour = float((guide[b, :, y, x] - guide[b, :, v, u]).square().sum()) / sigma_rgb**2
                result[b, :, y, x] += math.exp(-0.5 * (space + colour)) * values[b, :, v, u]
    return result


def case(batch: int, channels: int, grid: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, channels, *grid, generator=generator, dtype=torch.float64).softmax(1)
    guide = torch.rand(batch, 3, *grid, generator=generator, dtype=torch.float64) * 255
    return values, guide, torch.rand(batch, *grid, generator=generator, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    sigma_xy=st.floats(0.5, 50),
    sigma_rgb=st.floats(10, 200),
    seed=st.integers(0, 100),
)
def test_equals_the_double_loop(
    batch: int, channels: int, grid: tuple[int, int], sigma_xy: float, sigma_rgb: float, seed: int
) -> None:
    values, guide, gate = case(batch, channels, grid, seed)
    filtered = filter_by_hand(values, guide, sigma_xy, sigma_rgb)
    torch.testing.assert_close(bilateral_filter(values, guide, sigma_xy, sigma_rgb), filtered)
    energy = -(values * filtered * gate[:, None]).sum() / batch
    torch.testing.assert_close(dense_energy(values, guide, gate, sigma_xy, sigma_rgb), energy)


def test_tiles_cut_anywhere_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values, guide, _ = case(1, 3, (7, 9))
    expected = bilateral_filter(values, guide, 5.0, 40.0)
    monkeypatch.setattr(dense, "TILE_ELEMENTS", 63 * 10)
    torch.testing.assert_close(bilateral_filter(values, guide, 5.0, 40.0), expected)


def test_gradcheck_of_the_filtered_values() -> None:
    values, guide, _ = case(2, 2, (3, 4))
    torch.autograd.gradcheck(lambda value: bilateral_filter(value, guide, 3.0, 60.0), values.requires_grad_())


def test_gradcheck_of_the_energy_where_the_gate_is_constant() -> None:
    values, guide, gate = case(2, 2, (3, 4))
    gate = torch.full_like(gate, 0.6)
    torch.autograd.gradcheck(lambda value: dense_energy(value, guide, gate, 3.0, 60.0), values.requires_grad_())


def test_energy_backward_is_the_rule_of_the_method() -> None:
    values, guide, gate = case(2, 3, (4, 4))
    values.requires_grad_()
    (dense_energy(values, guide, gate, 4.0, 50.0) * 3).backward()
    filtered = filter_by_hand(values.detach(), guide, 4.0, 50.0)
    torch.testing.assert_close(values.grad, 3 * -2 * gate[:, None] * filtered / 2)


def test_gate_of_zero_gives_energy_and_gradient_zero() -> None:
    values, guide, gate = case(1, 3, (4, 4))
    energy = dense_energy(values.requires_grad_(), guide, torch.zeros_like(gate), 4.0, 50.0)
    energy.backward()
    assert energy.item() == 0
    assert values.grad is not None
    assert values.grad.eq(0).all()


def test_all_zero_values_stay_zero() -> None:
    _, guide, _ = case(1, 3, (4, 4))
    assert bilateral_filter(torch.zeros(1, 3, 4, 4), guide, 4.0, 50.0).eq(0).all()


@pytest.mark.parametrize("sigma_rgb", [3.0, 15.0])
def test_float32_is_close_to_float64_at_the_shipped_widths(sigma_rgb: float) -> None:
    values, guide, _ = case(1, 5, (24, 24))
    guide = (guide / 51).round() * 51 + torch.rand(1, 3, 24, 24, dtype=torch.float64)  # flat regions in far colours
    truth = bilateral_filter(values, guide, 50.0, sigma_rgb)
    tolerance = 1e-6 * 2 * 3 * (128 / sigma_rgb) ** 2 / 10  # 2e-7 of the largest squared feature, with head room
    torch.testing.assert_close(
        bilateral_filter(values.float(), guide.float(), 50.0, sigma_rgb).double(), truth, rtol=tolerance, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    values, guide, gate = case(2, 3, (4, 5))
    values = values.to(dtype).requires_grad_()
    energy = dense_energy(values, guide.float(), gate.to(dtype), 4.0, 50.0)
    (gradient,) = torch.autograd.grad(energy, values)
    assert energy.dtype == torch.float32
    assert gradient.dtype == dtype
    expected = dense_energy(values.detach().float(), guide.float(), gate.to(dtype).float(), 4.0, 50.0)
    torch.testing.assert_close(energy, expected, rtol=0, atol=0)


def test_strides_do_not_matter() -> None:
    values, guide, gate = case(2, 3, (4, 5))
    expected = dense_energy(values, guide, gate, 4.0, 50.0)
    last = torch.channels_last
    energy = dense_energy(
        values.contiguous(memory_format=last), guide.contiguous(memory_format=last), gate.mT.contiguous().mT, 4.0, 50.0
    )
    torch.testing.assert_close(energy, expected)


def test_tiny_probabilities_do_not_slow_the_filter() -> None:
    guide = torch.rand(1, 3, 64, 64) * 255
    seconds = []
    for sharpness in (0.0, 40.0):  # 40: probabilities down to e^-200, whose products would be subnormal
        probabilities = (torch.randn(1, 21, 64, 64) * sharpness).softmax(1)
        bilateral_filter(probabilities, guide, 50.0, 15.0)
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            bilateral_filter(probabilities, guide, 50.0, 15.0)
            runs.append(time.perf_counter() - start)
        seconds.append(min(runs))
    assert seconds[1] < 8 * seconds[0]
