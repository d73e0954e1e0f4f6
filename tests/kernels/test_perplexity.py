"""perplexity: values by hand, derivatives, and the kernel against float64 and the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, assert_fullgraph, assert_no_copies, assert_three_way, layouts
from torch import Tensor

from cosa_fast.kernels import perplexity
from cosa_fast.kernels.perplexity import _backward, _forward, _run

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def confidences(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.rand(shape, generator=generator).to(device, dtype)


def derivative(values: Tensor, weights: Tensor, backend: str, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    values = values.detach().clone().requires_grad_()
    result = perplexity(values, 0.37, alpha, beta, backend=backend)
    return result, torch.autograd.grad(result, values, weights.to(result.dtype))[0]


@pytest.mark.parametrize(("confidence", "expected"), [
    (1.0, -math.log(0.8)),  # d = 1 above
    (0.7, -math.log(0.8 * 0.5)),  # halfway above
    (0.2, -math.log(0.8 * 0.5)),  # halfway below
    (0.0, -math.log(0.8)),
    (0.4, -math.log(0.8e-4)),  # at the threshold: d is cut off
])  # fmt: skip
def test_values_by_hand(kernel_device: torch.device, backend: str, confidence: float, expected: float) -> None:
    values = torch.tensor([confidence], device=kernel_device)
    assert perplexity(values, 0.4, backend=backend).item() == pytest.approx(expected)
    squared = perplexity(values, torch.tensor(0.4, device=kernel_device), beta=2.0, backend=backend)
    assert squared.item() == pytest.approx(expected**2)


def test_it_is_one_without_beta_and_float32_for_half(kernel_device: torch.device, backend: str) -> None:
    values = confidences(5, 5, dtype=torch.bfloat16, device=kernel_device)
    assert perplexity(values, 0.3, beta=0.0, backend=backend).eq(1).all()
    assert perplexity(values, 0.3, backend=backend).dtype == torch.float32


def test_gradcheck() -> None:
    confidence = torch.tensor([0.05, 0.3, 0.55, 0.9], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda value: perplexity(value, 0.4, 0.7, 1.5), confidence)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 1.0), (0.5, 2.0), (0.9, 0.0)])
def test_value_and_derivative_are_as_exact_as_plain_pytorch(
    kernel_device: torch.device, dtype: torch.dtype, alpha: float, beta: float
) -> None:
    values = confidences(3, 5, 7, dtype=dtype, device=kernel_device)
    weights = torch.linspace(-1, 1, values.numel(), dtype=torch.float64, device=kernel_device).view_as(values)
    found, plain, truth = (
        derivative(given_values, weights, backend, alpha, beta)
        for given_values, backend in ((values, "triton"), (values, "reference"), (values.double(), "reference"))
    )
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    for name, a, b, c in zip(("P", "dP"), found, plain, truth, strict=True):
        assert_three_way(a, b, c, 1e-6, name)


@settings(max_examples=10, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=0, max_size=6), threshold=st.floats(0.01, 0.99))
def test_any_shape(shape: list[int], threshold: float) -> None:
    values = confidences(*shape, device=DEVICE)
    found = perplexity(values, torch.tensor(threshold, device=DEVICE), backend="triton")
    torch.testing.assert_close(found, perplexity(values, threshold, backend="reference"), rtol=1e-5, atol=1e-5)


def test_layouts_are_read_in_place(kernel_device: torch.device, poisoned: None) -> None:
    values = confidences(2, 3, 4, 5, device=kernel_device)
    expected = perplexity(values, 0.4, backend="triton")
    threshold = torch.tensor(0.4, device=kernel_device)
    for name, view in layouts(values):
        assert torch.equal(perplexity(view, 0.4, backend="triton"), expected), name
        out = torch.empty_like(values)
        assert_no_copies(lambda view=view, out=out: _run(view, threshold, None, out, 0.8, 1.0))


@pytest.mark.parametrize("outside", [-1.0, 0.0, 1.0, 7.0])
def test_threshold_tensors_outside_the_range_are_kept_inside(kernel_device: torch.device, outside: float) -> None:
    values = torch.tensor([0.0, 0.5, 1.0], device=kernel_device)
    threshold = torch.tensor(outside, device=kernel_device)
    found, plain = (perplexity(values, threshold, backend=backend) for backend in ("triton", "reference"))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, plain)


def test_repeated_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    values = confidences(4, 33, device=kernel_device)
    first, second = (perplexity(values, 0.4, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_registration(kernel_device: torch.device) -> None:
    values = confidences(2, 9, device=kernel_device).requires_grad_()
    threshold = torch.tensor(0.4, device=kernel_device)
    torch.library.opcheck(_forward, (values, threshold, 0.8, 1.0))
    torch.library.opcheck(_backward, (torch.ones(2, 9, device=kernel_device), values.detach(), threshold, 0.8, 1.0))
    assert_fullgraph(lambda x: perplexity(x, 0.4, backend="triton"), values.detach())
