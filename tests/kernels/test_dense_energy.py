"""dense_energy against a sum by hand, the rule of its backward, and, kernel against definition, float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import (
    DEVICE,
    assert_fullgraph,
    assert_no_copies,
    assert_same,
    assert_three_way,
    far_copy,
    layouts,
)
from torch import Tensor

from cosa_fast.kernels import bilateral_filter, dense_energy
from cosa_fast.kernels.bilateral_filter import run_filter
from cosa_fast.kernels.dense_energy import _backward, _forward, _run_backward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = 2e-6


def case(
    batch: int, channels: int, height: int, width: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels + width)
    probabilities = torch.randn(batch, channels, height, width, generator=generator).softmax(1)
    guide = torch.randint(0, 90, (batch, 3, height, width), generator=generator)
    gate = torch.rand(batch, height, width, generator=generator)
    return probabilities.to(device), guide.to(device, torch.uint8), gate.to(device)


def energy(probabilities: Tensor, guide: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The energy, and the gradient of three times it."""
    probabilities = probabilities.detach().clone().requires_grad_()
    result = dense_energy(probabilities, guide, gate, 5.0, 15.0, backend=backend)
    return result.detach(), torch.autograd.grad(3 * result, probabilities)[0]


def assert_as_exact(probabilities: Tensor, guide: Tensor, gate: Tensor) -> None:
    found, plain = (energy(probabilities, guide, gate, backend) for backend in ("triton", "reference"))
    truth = energy(probabilities.double(), guide.double(), gate.double(), "reference")
    assert found[0].dtype == torch.float32
    assert found[1].dtype == probabilities.dtype
    for name, a, b, c in zip(("energy", "gradient"), found, plain, truth, strict=True):
        truncated = a.dtype == torch.bfloat16 and not a.is_cuda  # by the interpreter: an error of up to 2^-7
        assert_three_way(a, b, c, TOLERANCE + truncated * 2**-8, name)


def test_energy_and_gradient_are_those_of_the_method(kernel_device: torch.device, backend: str) -> None:
    probabilities, guide, gate = case(2, 3, 3, 5, kernel_device)
    filtered = bilateral_filter(probabilities.double(), guide, 5.0, 15.0)
    value, gradient = energy(probabilities, guide, gate, backend)
    torch.testing.assert_close(value.double(), -(probabilities * filtered * gate[:, None]).sum() / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), 3 * -2 * gate[:, None] * filtered / 2, rtol=1e-5, atol=1e-6)


def test_gradcheck_where_the_gate_is_constant() -> None:
    probabilities, guide, gate = case(2, 2, 3, 4)
    gate = torch.full_like(gate, 0.6)
    leaf = probabilities.double().requires_grad_()
    torch.autograd.gradcheck(lambda value: dense_energy(value, guide, gate, 3.0, 60.0), leaf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 3, 5), (1, 21, 2, 37)])
def test_energy_and_gradient_are_as_exact_as_plain_pytorch(
    kernel_device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    probabilities, guide, gate = case(*shape, kernel_device)
    assert_as_exact(probabilities.to(dtype), guide, gate.to(dtype))


def test_half_types_are_computed_in_float32(kernel_device: torch.device, backend: str) -> None:
    probabilities, guide, gate = case(2, 3, 3, 5, kernel_device)
    probabilities, gate = probabilities.to(torch.bfloat16), gate.to(torch.bfloat16)
    found, expected = energy(probabilities, guide, gate, backend), energy(probabilities.float(), guide, gate, backend)
    assert torch.equal(found[0], expected[0])
    assert found[1].dtype == torch.bfloat16


def test_eighty_one_channels_in_two_chunks(kernel_device: torch.device) -> None:
    assert_as_exact(*case(1, 81, 2, 3, kernel_device))


@settings(max_examples=5, deadline=None)
@given(shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 2), st.integers(1, 36)))
def test_any_shape(shape: tuple[int, int, int, int]) -> None:
    assert_as_exact(*case(*shape, DEVICE))


def test_a_closed_gate_gives_energy_and_gradient_zero(kernel_device: torch.device, backend: str) -> None:
    probabilities, guide, gate = case(2, 3, 3, 5, kernel_device)
    value, gradient = energy(probabilities, guide, torch.zeros_like(gate), backend)
    assert value.item() == 0
    assert gradient.eq(0).all()


def test_only_the_pixels_of_an_open_gate_count(kernel_device: torch.device) -> None:
    probabilities, guide, gate = case(1, 3, 3, 5, kernel_device)
    gate = torch.zeros_like(gate)
    gate[0, 1, 2] = 0.7
    assert_as_exact(probabilities, guide, gate)
    _, gradient = energy(probabilities, guide, gate, "triton")
    assert gradient[0, :, 1, 2].ne(0).all()
    assert gradient.ne(0).sum() == 3


def test_layouts_are_read_in_place(kernel_device: torch.device, poisoned: None) -> None:
    given_case = case(2, 3, 3, 5, kernel_device)
    expected = energy(*given_case, "triton")
    for views in zip(*(layouts(tensor) for tensor in given_case), strict=True):
        values, guide, gate = (view for _, view in views)
        assert_same(energy(values, guide, gate, "triton"), expected)
        for a, b in zip(energy(values, guide, gate, "reference"), expected, strict=True):
            torch.testing.assert_close(a, b)
        out = torch.empty_like(given_case[0])
        assert_no_copies(lambda a=(values, guide, gate, out): run_filter(*a, 5.0, 15.0))
        assert_no_copies(lambda out=out: _run_backward(expected[0], out, out))


def test_the_gradient_reads_the_stored_filter_once(kernel_device: torch.device) -> None:
    probabilities, guide, gate = case(1, 3, 3, 5, kernel_device)
    _, gated = _forward(probabilities, guide, gate, 5.0, 15.0)
    gradient = _backward(torch.tensor(3.0, device=kernel_device), gated, torch.float32)
    assert torch.equal(gradient, -6 * gated)


def test_repeated_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    assert_same(*(energy(*case(1, 3, 5, 17, kernel_device), "triton") for _ in range(2)))


@pytest.mark.parametrize("axis", range(3))
def test_offsets_beyond_two_to_the_31_elements(kernel_device: torch.device, axis: int) -> None:
    probabilities, guide, gate = case(3, 2, 3, 3, kernel_device)
    gate = gate.bfloat16()
    expected = energy(probabilities, guide, gate, "triton")
    assert_same(energy(probabilities, guide, far_copy(gate, axis), "triton"), expected)


def test_registration(kernel_device: torch.device) -> None:
    probabilities, guide, gate = case(1, 2, 2, 3, kernel_device)
    torch.library.opcheck(_forward, (probabilities.requires_grad_(), guide, gate, 5.0, 15.0))
    gated = torch.rand_like(probabilities)
    torch.library.opcheck(_backward, (torch.ones((), device=kernel_device), gated, torch.bfloat16))
    assert_fullgraph(lambda p: dense_energy(p, guide, gate, 5.0, 15.0, backend="triton"), probabilities.detach())
