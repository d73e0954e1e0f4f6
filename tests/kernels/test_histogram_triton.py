"""The histogram kernels against the definition: counts are exact, so everything is bit-equal."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import assert_fullgraph, assert_no_copies, layouts
from torch import Tensor

from cosa_fast.kernels import histogram
from cosa_fast.kernels.histogram import _histogram, _run

BINS = [2, 64, 256, 1000]


def case(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Confidences, some outside [0, 1] and many on the edges of bins, and a mask."""
    generator = torch.Generator().manual_seed(len(shape))
    values = torch.rand(shape, generator=generator) * 1.2 - 0.1
    values = torch.where(torch.rand(shape, generator=generator) < 0.3, (values * 64).round() / 64, values)
    return values.to(device, dtype), (torch.rand(shape, generator=generator) < 0.7).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bins", BINS)
def test_counts_are_those_of_the_definition(kernel_device: torch.device, bins: int, dtype: torch.dtype) -> None:
    values, valid = case(3, 17, 29, device=kernel_device, dtype=dtype)
    for mask in (valid, None):
        found = histogram(values, mask, bins, backend="triton")
        assert found.dtype == torch.float32
        assert torch.equal(found, histogram(values, mask, bins, backend="reference"))


@settings(max_examples=10, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=0, max_size=6), bins=st.integers(2, 300))
def test_any_shape(shape: list[int], bins: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values, valid = case(*shape, device=device)
    found = histogram(values, valid, bins, backend="triton")
    assert torch.equal(found, histogram(values, valid, bins, backend="reference"))


def test_programs_that_walk_over_several_blocks_count_every_value_once(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[_run.__module__], "MAX_PROGRAMS", 2)
    values, valid = case(7000, device=kernel_device)
    found = histogram(values, valid, 64, backend="triton")
    assert torch.equal(found, histogram(values, valid, 64, backend="reference"))


def test_values_on_edges_belong_to_the_upper_bin_and_one_to_the_last(kernel_device: torch.device) -> None:
    values = torch.tensor([0.0, 0.25, 0.2499, 0.5, 0.75, 0.9999, 1.0], device=kernel_device)
    assert histogram(values, None, 4, backend="triton").tolist() == [2, 1, 1, 3]


def test_what_lies_outside_goes_to_the_outermost_bins_and_nan_to_the_first(kernel_device: torch.device) -> None:
    values = torch.tensor([torch.nan, -torch.inf, -1e30, -0.1, 1.1, 1e30, torch.inf], device=kernel_device)
    assert histogram(values, None, 4, backend="triton").tolist() == [4, 0, 0, 3]


def test_nothing_valid_gives_zeros(kernel_device: torch.device, poisoned: None) -> None:
    values, valid = case(5, 7, device=kernel_device)
    assert histogram(values, valid & False, 256, backend="triton").eq(0).all()
    valid[2, 3] = True
    assert histogram(values, valid & (valid.cumsum(1) == 1), 256, backend="triton").sum() >= 1


def test_histograms_add_up_over_ranks(kernel_device: torch.device) -> None:
    values, valid = case(4, 5, 6, device=kernel_device)
    parts = [histogram(values[part], valid[part], backend="triton") for part in (slice(0, 1), slice(1, 4))]
    assert torch.equal(parts[0] + parts[1], histogram(values, valid, backend="triton"))


def test_layouts_are_read_in_place(kernel_device: torch.device, poisoned: None) -> None:
    values, valid = case(2, 3, 4, 5, device=kernel_device)
    expected = histogram(values, valid, backend="triton")
    # Shifted, so that the strides of both differ.
    views = list(layouts(valid))
    for (name, view), (_, mask) in zip(layouts(values), views[1:] + views[:1], strict=True):
        assert torch.equal(histogram(view, mask, backend="triton"), expected), name
        out = torch.empty(256, device=kernel_device)
        assert_no_copies(lambda view=view, mask=mask, out=out: _run(view, mask, out))
        assert_no_copies(lambda view=view, out=out: _run(view, None, out))


@pytest.mark.parametrize("axis", range(4))
def test_far_elements_are_addressed(kernel_device: torch.device, axis: int) -> None:
    values, valid = case(4, 3, 3, 4, device=kernel_device, dtype=torch.bfloat16)
    far = []
    for tensor in (values, valid):
        strides = list(tensor.stride())
        strides[axis] = 2**31 // (tensor.shape[axis] - 1) + 5  # only the touched pages exist on a CPU
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
        memory = torch.empty(last + 1, dtype=tensor.dtype, device=kernel_device)
        far.append(memory.as_strided(tensor.shape, strides).copy_(tensor))
    assert torch.equal(histogram(far[0], far[1], backend="triton"), histogram(values, valid, backend="triton"))


def test_registration_without_gradient_and_repeatable(kernel_device: torch.device) -> None:
    values, valid = case(5, 7, device=kernel_device)
    torch.library.opcheck(_histogram, (values, valid, 64))
    torch.library.opcheck(_histogram, (values, None, 64))
    assert not histogram(values.requires_grad_(), valid, backend="triton").requires_grad
    assert_fullgraph(lambda x, v: histogram(x, v, backend="triton"), values.detach(), valid)
