"""histogram: counts by hand; kernel and definition agree bit for bit, as counts are exact."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, assert_fullgraph, assert_no_copies, far_copy, layouts
from torch import Tensor

from cosa_fast.kernels import histogram
from cosa_fast.kernels.histogram import _histogram, _run


def case(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Confidences, some outside [0, 1] and many on the edges of bins, and a mask."""
    generator = torch.Generator().manual_seed(len(shape))
    values = torch.rand(shape, generator=generator) * 1.2 - 0.1
    values = torch.where(torch.rand(shape, generator=generator) < 0.3, (values * 64).round() / 64, values)
    return values.to(device, dtype), (torch.rand(shape, generator=generator) < 0.7).to(device)


def assert_agrees(values: Tensor, valid: Tensor | None, bins: int) -> None:
    found = histogram(values, valid, bins, backend="triton")
    assert found.dtype == torch.float32
    assert torch.equal(found, histogram(values, valid, bins, backend="reference"))


def test_values_on_edges_belong_to_the_upper_bin_and_one_to_the_last(kernel_device: torch.device, backend: str) -> None:
    values = torch.tensor([[0.0, 0.25, 0.2499, 0.5], [0.75, 0.9999, 1.0, 0.6]], device=kernel_device)
    valid = torch.ones_like(values, dtype=torch.bool)
    valid[1, 3] = False
    counts = histogram(values, valid, 4, backend=backend)
    assert counts.tolist() == [2, 1, 1, 3]
    assert counts.dtype == torch.float32
    assert histogram(values, None, 4, backend=backend).tolist() == [2, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_definition_counts_as_numpy_does(dtype: torch.dtype) -> None:
    values, valid = torch.rand(4, 5, 6).to(dtype), torch.rand(4, 5, 6) < 0.5
    expected = np.histogram(values.double()[valid].numpy(), 256, (0, 1))[0]
    counts = histogram(values.mT.contiguous().mT, valid.mT.contiguous().mT)
    assert counts.tolist() == expected.tolist()


def test_what_lies_outside_goes_to_the_outermost_bins_and_nan_to_the_first(kernel_device: torch.device) -> None:
    values = torch.tensor([torch.nan, -torch.inf, -1e30, -0.1, 1.1, 1e30, torch.inf], device=kernel_device)
    assert histogram(values, None, 4, backend="triton").tolist() == [4, 0, 0, 3]


def test_nothing_valid_gives_zeros_and_one_valid_pixel_counts_alone(
    kernel_device: torch.device, backend: str, poisoned: None
) -> None:
    values, valid = case(5, 7, device=kernel_device)
    assert histogram(values, valid & False, 256, backend=backend).eq(0).all()
    alone = torch.zeros_like(valid)
    alone[2, 3] = True
    assert histogram(values, alone, 256, backend=backend).sum() == 1


def test_histograms_add_up_over_ranks(kernel_device: torch.device, backend: str) -> None:
    values, valid = case(4, 5, 6, device=kernel_device)
    parts = [histogram(values[part], valid[part], backend=backend) for part in (slice(0, 1), slice(1, 4))]
    assert torch.equal(parts[0] + parts[1], histogram(values, valid, backend=backend))


@pytest.mark.parametrize(("dtype", "bins"), [
    (torch.float32, 2), (torch.float16, 64), (torch.bfloat16, 256), (torch.float32, 1000), (torch.float32, 64),
])  # fmt: skip
def test_counts_are_those_of_the_definition(kernel_device: torch.device, bins: int, dtype: torch.dtype) -> None:
    values, valid = case(3, 17, 29, device=kernel_device, dtype=dtype)
    for mask in (valid, None):
        assert_agrees(values, mask, bins)


@settings(max_examples=8, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=0, max_size=6), bins=st.integers(2, 300))
def test_any_shape(shape: list[int], bins: int) -> None:
    assert_agrees(*case(*shape, device=DEVICE), bins)


def test_programs_that_walk_over_several_blocks_count_every_value_once(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[_run.__module__], "MAX_PROGRAMS", 2)
    assert_agrees(*case(7000, device=kernel_device), 64)


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
    found = histogram(far_copy(values, axis), far_copy(valid, axis), backend="triton")
    assert torch.equal(found, histogram(values, valid, backend="triton"))


def test_registration_without_gradient_and_repeatable(kernel_device: torch.device) -> None:
    values, valid = case(5, 7, device=kernel_device)
    torch.library.opcheck(_histogram, (values, valid, 64))
    torch.library.opcheck(_histogram, (values, None, 64))
    assert not histogram(values.requires_grad_(), valid, backend="triton").requires_grad
    assert_fullgraph(lambda x, v: histogram(x, v, backend="triton"), values.detach(), valid)
