"""bilateral_filter against a double loop, float64 and, kernel against definition, plain PyTorch."""

import math

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

from cosa_fast.kernels import bilateral_filter
from cosa_fast.kernels.bilateral_filter import _backward, _forward, _product, run_filter
from cosa_fast.kernels.launch.runtime import launch, tl, triton_jit
from cosa_fast.kernels.launch.table import Configuration
from cosa_fast.kernels.reference import dense

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the largest result: 2 rounding errors per feature, and the approximate exponential of the hardware.
TOLERANCE = 2e-6


def case(
    batch: int, channels: int, height: int, width: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Probabilities, and a guide of flat regions with noise, so that near and far colours occur."""
    generator = torch.Generator().manual_seed(channels + width)
    values = torch.randn(batch, channels, height, width, generator=generator).softmax(1)
    guide = torch.randint(0, 4, (batch, 3, height, width), generator=generator) * 25
    guide += torch.randint(0, 9, guide.shape, generator=generator)
    return values.to(device), guide.to(device, torch.uint8)


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


def filtered(
    values: Tensor, guide: Tensor, backend: str, sigma_xy: float = 5.0, sigma_rgb: float = 15.0
) -> tuple[Tensor, Tensor]:
    """A(V) and the gradient of its weighted sum."""
    values = values.detach().clone().requires_grad_()
    result = bilateral_filter(values, guide, sigma_xy, sigma_rgb, backend=backend)
    weights = torch.linspace(-1, 1, values.numel(), dtype=torch.float64, device=values.device).view_as(values)
    return result, torch.autograd.grad(result, values, weights.to(result.dtype))[0]


def assert_as_exact(values: Tensor, guide: Tensor, *sigmas: float) -> None:
    found, plain = (filtered(values, guide, backend, *sigmas) for backend in ("triton", "reference"))
    truth = filtered(values.double(), guide.double(), "reference", *sigmas)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == values.dtype
    for name, a, b, c in zip(("A(V)", "gradient"), found, plain, truth, strict=True):
        truncated = a.dtype == torch.bfloat16 and not a.is_cuda  # by the interpreter: an error of up to 2^-7
        assert_three_way(a, b, c, TOLERANCE + truncated * 2**-8, name)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    sigma_xy=st.floats(0.5, 50),
    sigma_rgb=st.floats(10, 200),
)
def test_the_definition_is_the_double_loop(shape: tuple[int, int, int, int], sigma_xy: float, sigma_rgb: float) -> None:
    values, guide = (tensor.double() for tensor in case(*shape))
    expected = filter_by_hand(values, guide, sigma_xy, sigma_rgb)
    torch.testing.assert_close(bilateral_filter(values, guide, sigma_xy, sigma_rgb), expected)


def test_tiles_of_the_definition_may_be_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    values, guide = (tensor.double() for tensor in case(1, 3, 7, 9))
    expected = bilateral_filter(values, guide, 5.0, 40.0)
    monkeypatch.setattr(dense, "TILE_ELEMENTS", 63 * 10)
    torch.testing.assert_close(bilateral_filter(values, guide, 5.0, 40.0), expected)


def test_gradcheck() -> None:
    values, guide = (tensor.double() for tensor in case(2, 2, 3, 4))
    torch.autograd.gradcheck(lambda value: bilateral_filter(value, guide, 3.0, 60.0), values.requires_grad_())


@pytest.mark.parametrize("sigma_rgb", [3.0, 15.0])
def test_float32_is_close_to_float64_at_the_shipped_widths(sigma_rgb: float) -> None:
    values, _ = case(1, 5, 24, 24)
    generator = torch.Generator().manual_seed(0)
    guide = torch.randint(0, 6, (1, 3, 24, 24), generator=generator) * 51.0  # flat regions in far colours
    guide = guide + torch.rand(1, 3, 24, 24, generator=generator)
    truth = bilateral_filter(values.double(), guide.double(), 50.0, sigma_rgb)
    tolerance = 1e-6 * 2 * 3 * (128 / sigma_rgb) ** 2 / 10  # 2e-7 of the largest squared feature, with head room
    found = bilateral_filter(values, guide, 50.0, sigma_rgb)
    torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=1e-6)


def test_the_definition_never_computes_with_subnormal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are 40 times slower on a CPU."""
    guide = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255
    values = (torch.randn(1, 21, 16, 16, generator=torch.Generator().manual_seed(1)) * 40).softmax(1)
    smallest = torch.finfo(torch.float32).tiny
    assert ((values > 0) & (values < smallest)).any()
    factors: list[Tensor] = []
    multiply = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: factors.extend((a, b)) or multiply(a, b))
    bilateral_filter(values, guide, 50.0, 3.0)
    (_, _, weights, kept) = factors
    assert weights.min() > 1e15 * smallest  # times the smallest value that is kept: a normal number
    assert ((kept == 0) | (kept >= 1e-15)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 3, 5), (1, 20, 2, 37)])
def test_filter_and_gradient_are_as_exact_as_plain_pytorch(
    kernel_device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    values, guide = case(*shape, kernel_device)
    assert_as_exact(values.to(dtype), guide)


@pytest.mark.parametrize("channels", [21, 80, 81, 1203])
def test_any_number_of_channels(kernel_device: torch.device, channels: int) -> None:
    assert_as_exact(*case(1, channels, 1, 3, kernel_device))


@pytest.mark.parametrize("sigmas", [(0.3, 15.0), (50.0, 3.0), (1e4, 1e4), (67.0, 0.01)])
def test_narrow_and_wide_kernels(kernel_device: torch.device, sigmas: tuple[float, float]) -> None:
    values, guide = case(1, 3, 5, 9, kernel_device)
    assert_as_exact(values, guide, *sigmas)


def test_rows_out_of_reach_are_nothing(kernel_device: torch.device) -> None:
    values, guide = torch.ones(1, 1, 24, 3, device=kernel_device), torch.zeros(1, 3, 24, 3, device=kernel_device)
    values[0, 0, 12:] = 1e6  # e^-50 of it is 2e-16
    found = bilateral_filter(values, guide, 0.2, 10.0, backend="triton")
    truth = bilateral_filter(values.double(), guide.double(), 0.2, 10.0)
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("magnitude", [0.0, 1e-12, 1e12])
def test_values_of_any_sign_and_magnitude(kernel_device: torch.device, magnitude: float) -> None:
    values, guide = case(1, 3, 3, 5, kernel_device)
    assert_as_exact((values - 0.4) * magnitude, guide)


@triton_jit
def _product_kernel(left_ptr, right_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, _product(tl.load(left_ptr + at), tl.load(right_ptr + at), True))


def test_products_in_two_parts_are_as_exact_as_float32(kernel_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(32, 32, generator=generator).to(kernel_device) for _ in range(2))
    out = torch.empty_like(left)
    launch(_product_kernel, (1,), Configuration(), left_ptr=left, right_ptr=right, out_ptr=out, SIZE=32)
    truth = left.double() @ right.double()
    assert_three_way(out, left @ right, truth, 5e-7)
    high = (left.view(torch.int32) & -8192).view(torch.float32)
    one_part = high.double() @ right.double()
    assert (one_part - truth).abs().max() > 1e-4 * truth.max()  # what a single product on tensor cores would give


@settings(max_examples=6, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 2), st.integers(1, 36)),
    sigma_xy=st.floats(0.5, 60),
    sigma_rgb=st.floats(3, 200),
)
def test_any_shape(shape: tuple[int, int, int, int], sigma_xy: float, sigma_rgb: float) -> None:
    values, guide = case(*shape, DEVICE)
    assert_as_exact(values, guide, sigma_xy, sigma_rgb)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_guides_of_any_number_type(kernel_device: torch.device, backend: str, dtype: torch.dtype) -> None:
    values, guide = case(1, 2, 2, 6, kernel_device)
    expected = bilateral_filter(values, guide, 5.0, 15.0, backend=backend)
    assert torch.equal(bilateral_filter(values, guide.to(dtype), 5.0, 15.0, backend=backend), expected)


def test_layouts_are_read_in_place(kernel_device: torch.device, poisoned: None) -> None:
    values, guide = case(2, 3, 3, 5, kernel_device)
    expected = bilateral_filter(values, guide, 5.0, 15.0, backend="triton")
    for (name, view), (_, guide_view) in zip(layouts(values), layouts(guide), strict=True):
        assert torch.equal(bilateral_filter(view, guide_view, 5.0, 15.0, backend="triton"), expected), name
        torch.testing.assert_close(bilateral_filter(view, guide_view, 5.0, 15.0, backend="reference"), expected)
        out = torch.empty_like(values)
        assert_no_copies(lambda v=view, g=guide_view, out=out: run_filter(v, g, None, out, 5.0, 15.0))


def test_expanded_values_are_read_in_place(kernel_device: torch.device) -> None:
    _, guide = case(2, 1, 3, 5, kernel_device)
    ones = torch.ones(1, device=kernel_device)
    found = bilateral_filter(ones.expand(2, 1, 3, 5), guide, 5.0, 15.0, backend="triton")
    assert torch.equal(found, bilateral_filter(ones.repeat(2, 1, 3, 5), guide, 5.0, 15.0, backend="triton"))


def test_repeated_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    values, guide = case(1, 3, 5, 17, kernel_device)
    assert_same(*(filtered(values, guide, "triton") for _ in range(2)))


@pytest.mark.parametrize("axis", range(4))
def test_offsets_beyond_two_to_the_31_elements(kernel_device: torch.device, axis: int) -> None:
    values, guide = case(3, 3, 3, 3, kernel_device)
    values = values.bfloat16()
    expected = bilateral_filter(values, guide, 5.0, 15.0, backend="triton")
    found = bilateral_filter(far_copy(values, axis), far_copy(guide, axis), 5.0, 15.0, backend="triton")
    assert torch.equal(found, expected)


def test_registration(kernel_device: torch.device) -> None:
    values, guide = case(1, 2, 2, 3, kernel_device)
    torch.library.opcheck(_forward, (values.requires_grad_(), guide, 5.0, 15.0))
    torch.library.opcheck(_backward, (values.detach(), guide, 5.0, 15.0, torch.bfloat16))
    assert_fullgraph(lambda v: bilateral_filter(v, guide, 5.0, 15.0, backend="triton"), values.detach())
