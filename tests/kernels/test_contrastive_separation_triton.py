"""The kernels of contrastive_separation against float64, the definition, and their own promises."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import assert_fullgraph, assert_no_copies, assert_three_way, layouts
from torch import Tensor

from cosa_fast.kernels import contrastive_separation, reference
from cosa_fast.kernels.contrastive_separation import (
    _backward,
    _buffers,
    _forward,
    _limit,
    _run_backward,
    _run_forward,
    _select,
)
from cosa_fast.kernels.launch import runtime

THRESHOLD = 0.4
Case = tuple[Tensor, Tensor, Tensor, Tensor]


def case(
    batch: int, channels: int, grid: tuple[int, int], device: torch.device | str = "cpu", seed: int = 0, labels: int = 3
) -> Case:
    """cam, category, confidence, valid with a few labels, ignored and invalid pixels."""
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randn(batch, channels, *grid, generator=generator)
    category = torch.randint(0, min(labels, channels) + 1, (batch, *grid), generator=generator)
    category[torch.rand(batch, *grid, generator=generator) < 0.1] = 255
    confidence = torch.rand(batch, *grid, generator=generator)
    valid = torch.rand(batch, *grid, generator=generator) < 0.8
    return cam.to(device), category.to(device, torch.int16), confidence.to(device), valid.to(device)


def derivative(backend: str, cam: Tensor, *rest: Any, **parameters: Any) -> tuple[Tensor, Tensor]:
    cam = cam.detach().requires_grad_()
    loss = contrastive_separation(cam, *rest, backend=backend, **parameters)
    return loss.detach(), torch.autograd.grad(loss, cam)[0]


def assert_as_exact(tolerance: float, cam: Tensor, *rest: Any, **parameters: Any) -> tuple[Tensor, Tensor]:
    found = derivative("triton", cam, *rest, **parameters)
    plain = derivative("reference", cam, *rest, **parameters)
    truth = derivative("reference", cam.double(), *rest, **parameters)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == cam.dtype
    for name, a, b, c in zip(("loss", "gradient"), found, plain, truth, strict=True):
        assert_three_way(a, b, c, tolerance, name)
    return found


def low_level(values: Case, scope: str = "image", similarity: str = "cosine") -> tuple[Any, ...]:
    cam, category, confidence, valid = values
    threshold = torch.tensor(THRESHOLD, device=cam.device)
    return cam, category, confidence, threshold, valid, 1.5, 0.5, 0.8, scope == "image", similarity == "cosine"


SHAPES = [(2, 1, (3, 3)), (1, 2, (1, 1)), (3, 2, (5, 7)), (2, 20, (7, 11)), (1, 80, (9, 8))]


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("batch", "channels", "grid"), SHAPES)
def test_loss_and_gradient_are_as_exact_as_plain_pytorch(
    kernel_device: torch.device, batch: int, channels: int, grid: tuple[int, int], scope: str, similarity: str
) -> None:
    values = case(batch, channels, grid, kernel_device)
    tolerance = 2e-6 if similarity == "cosine" else 5e-6  # scores of ±70 are rounded to 4e-6
    loss, _ = assert_as_exact(
        tolerance, *values[:3], THRESHOLD, values[3], epsilon=1.5, scope=scope, similarity=similarity
    )
    assert grid == (1, 1) or loss > 0


def test_rows_wider_than_a_tile_are_as_exact_as_plain_pytorch(kernel_device: torch.device) -> None:
    values = case(1, 1203, (4, 5), kernel_device, labels=2)
    assert_as_exact(2e-6, *values[:3], THRESHOLD, values[3], epsilon=2.0)


@pytest.mark.parametrize("channels", [20, 40])
def test_configurations_of_other_hardware_give_the_same_loss(
    kernel_device: torch.device, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "architecture", lambda device: "gfx942")
    values = case(1, channels, (6, 6), kernel_device)
    assert_as_exact(2e-6, *values[:3], THRESHOLD, values[3], epsilon=1.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_computed_in_float32(kernel_device: torch.device, dtype: torch.dtype) -> None:
    cam, category, confidence, valid = case(2, 5, (4, 5), kernel_device)
    arguments = (cam.to(dtype), category, confidence.to(dtype), THRESHOLD, valid)
    assert_as_exact(2e-6, *arguments, epsilon=1.5)


def test_small_losses_keep_their_relative_accuracy(kernel_device: torch.device) -> None:
    """Well-separated classes: softplus of −40 is e^-40, which log(1 + x) would round to 0."""
    cam = torch.eye(2, device=kernel_device)[:, [0, 0, 1, 1]].view(1, 2, 2, 2)
    category = torch.tensor([[[1, 1], [2, 2]]], device=kernel_device)
    confidence = torch.ones(1, 2, 2, device=kernel_device)
    loss = contrastive_separation(cam, category, confidence, 0.5, temperature=0.025, backend="triton")
    expected = torch.tensor(2.0).double() * torch.tensor(-40.0).double().exp()
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_logits_of_ten_thousand_stay_exact(kernel_device: torch.device, similarity: str) -> None:
    cam, category, confidence, valid = case(1, 3, (5, 5), kernel_device)
    assert_as_exact(2e-6, cam.sign() * 1e4, category, confidence, THRESHOLD, valid, epsilon=1.5, similarity=similarity)


def selection(values: Case, scope: str, limit: float, alpha: float = 0.8) -> tuple[Tensor, ...]:
    cam, category, confidence, valid = values
    saved = _buffers(cam, scope == "image")
    threshold = torch.tensor(THRESHOLD, device=cam.device)
    _select(cam, category, confidence, threshold, valid, saved, limit, alpha, True)
    return saved


@pytest.mark.parametrize(
    ("batch", "grid", "scope"), [(3, (7, 10), "image"), (3, (7, 10), "batch"), (64, (28, 28), "batch")]
)
def test_partition_keeps_the_order_of_the_pixels(
    kernel_device: torch.device, poisoned: None, batch: int, grid: tuple[int, int], scope: str
) -> None:
    cam, category, confidence, valid = values = case(batch, 1, grid, kernel_device)
    valid[1] = False  # an image without Ω between others
    features, labels, slots, counts, _ = (each.cpu() for each in selection(values, scope, _limit(1.0, 1.0)))
    label, usable = reference.pseudo_labels(confidence, category, THRESHOLD, valid, 1)
    selected = usable & (reference.perplexity(confidence, THRESHOLD) <= 1.0)
    groups = batch if scope == "image" else 1
    selected, label = selected.view(groups, -1).cpu(), label.view(groups, -1).cpu()
    assert torch.equal(counts, selected.sum(1).int())
    first = torch.arange(groups)[:, None] * selected.shape[1]
    expected = (selected.cumsum(1) - 1 + first).masked_fill(~selected, -1)
    assert torch.equal(slots.view(groups, -1), expected.int())
    for group, count in enumerate(counts.tolist()):
        of_group = labels.view(groups, -1)[group]
        assert torch.equal(of_group[:count], label[group][selected[group]].int())
        assert of_group[count:].eq(-1).all()
        of_group, signs = features.view(groups, -1, features.shape[1])[group], cam.sign().view(groups, -1).cpu()[group]
        torch.testing.assert_close(of_group[:count, 0], signs[selected[group]])  # one channel: x/‖x‖ is the sign
        assert of_group[count:].eq(0).all()
        assert of_group[:, 1:].eq(0).all()


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_selection_agrees_with_the_perplexity_up_to_rounding(kernel_device: torch.device, beta: float) -> None:
    confidence = torch.linspace(0, 1, 801, device=kernel_device).view(1, 1, -1)
    cam, category = torch.ones(1, 1, 1, 801, device=kernel_device), torch.ones_like(confidence, dtype=torch.uint8)
    scores = reference.perplexity(confidence, THRESHOLD, 0.8, beta)
    epsilon = float(scores[0, 0, 700])  # a pixel of the boundary itself
    slots = selection(
        (cam, category, confidence, torch.ones_like(category, dtype=torch.bool)), "image", _limit(epsilon, beta)
    )[2]
    differ = (slots.view_as(scores) >= 0) != (scores <= epsilon)
    assert 0 < int((scores <= epsilon).sum()) < 801
    assert not (differ & ((scores / epsilon - 1).abs() > 1e-6)).any()


@pytest.mark.parametrize(("epsilon", "beta", "count"), [(0.0, 1.0, 0), (0.99, 0.0, 0), (1.0, 0.0, 12), (1e30, 0.1, 12)])
def test_extreme_bounds_select_nothing_or_everything(
    kernel_device: torch.device, epsilon: float, beta: float, count: int
) -> None:
    cam, category, confidence, _ = case(1, 2, (3, 4), kernel_device)
    category, valid = category.clamp(0, 2), torch.ones(1, 3, 4, dtype=torch.bool, device=kernel_device)
    arguments = (cam, category, confidence, torch.tensor(THRESHOLD, device=kernel_device), valid)
    sums = _forward(*arguments, _limit(epsilon, beta), 0.5, 0.8, True, True)[0]
    assert sums[1].item() == count
    keywords = {"epsilon": epsilon, "temperature": 0.5, "alpha": 0.8, "beta": beta, "scope": "image"}
    torch.testing.assert_close(sums, reference.contrastive_separation(*arguments, **keywords, similarity="cosine"))


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("empty", ["valid", "category", "epsilon", "positives", "negatives", "all but one pixel"])
def test_empty_sets_give_loss_and_gradient_zero(
    kernel_device: torch.device, poisoned: None, empty: str, scope: str
) -> None:
    cam = torch.full((1, 4, 2, 2), 0.5, device=kernel_device)
    category = torch.ones(1, 2, 2, dtype=torch.uint8, device=kernel_device)
    valid, confidence = category.bool(), category.float()
    if empty == "valid":
        valid[:] = False
    elif empty == "category":
        category[:] = 255
    elif empty == "positives":
        category = torch.arange(4, device=kernel_device).view(1, 2, 2)
    elif empty == "all but one pixel":
        valid.view(-1)[1:] = False
    epsilon = 0.0 if empty == "epsilon" else 1.0
    loss, gradient = derivative("triton", cam, category, confidence, 0.5, valid, epsilon=epsilon, scope=scope)
    assert loss.item() == 0
    assert gradient.eq(0).all()


def test_images_of_uneven_sizes_pair_over_the_batch(kernel_device: torch.device) -> None:
    cam, category, confidence, valid = case(3, 4, (6, 7), kernel_device)
    valid[0], valid[1] = True, False
    valid[2].view(-1)[1:] = False
    category[category == 255] = 0
    for scope in ("image", "batch"):
        assert_as_exact(2e-6, cam, category, confidence, THRESHOLD, valid, epsilon=10.0, scope=scope)


@pytest.mark.parametrize("size", [0.0, 1e-7])
def test_vectors_without_direction_get_no_gradient(kernel_device: torch.device, size: float) -> None:
    cam, category, confidence, _ = case(1, 3, (4, 4), kernel_device)
    category = category.clamp(max=2)
    cam[..., 1, :] = size
    loss, gradient = assert_as_exact(2e-6, cam, category, confidence, THRESHOLD, None, epsilon=10.0)
    assert loss.isfinite()
    assert gradient[..., 1, :].eq(0).all()
    assert gradient[..., 0, :].ne(0).any()


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.uint8, [4, 255]), (torch.int8, [-1, -128]), (torch.int16, [-5, 300]),
        (torch.int64, [2**40, -(2**40) + 1]), (torch.int32, [4, 2**31 - 1]),
    ],
)  # fmt: skip
def test_categories_out_of_range_are_ignored(
    kernel_device: torch.device, dtype: torch.dtype, values: list[int]
) -> None:
    cam, category, confidence, valid = case(1, 3, (4, 5), kernel_device)
    category = category.clamp(max=3).to(dtype)
    unknown = torch.zeros_like(category, dtype=torch.bool)
    unknown[0, 0], unknown[0, 2, 1] = True, True
    marked = category.clone()
    marked[0, 0], marked[0, 2, 1] = values[0], values[1]
    found = derivative("triton", cam, marked, confidence, THRESHOLD, valid, epsilon=1.5)
    expected = derivative("triton", cam, category, confidence, THRESHOLD, valid & ~unknown, epsilon=1.5)
    assert expected[0] > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("outside", [-1.0, 0.0, 1.0, 7.0])
def test_threshold_tensors_outside_the_range_are_kept_inside(kernel_device: torch.device, outside: float) -> None:
    cam, category, confidence, valid = case(1, 3, (3, 4), kernel_device)
    threshold = torch.tensor(outside, device=kernel_device, dtype=torch.float64)
    found, plain = (
        derivative(backend, cam, category, confidence, threshold, valid, epsilon=20.0)
        for backend in ("triton", "reference")
    )
    assert found[0].isfinite()
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", ["cam", "category", "confidence", "valid"])
def test_layouts_are_read_in_place(kernel_device: torch.device, poisoned: None, name: str) -> None:
    names, values = ["cam", "category", "confidence", "valid"], case(2, 5, (3, 4), kernel_device)
    arguments = dict(zip(names, values, strict=True))
    expected = derivative("triton", threshold=THRESHOLD, epsilon=1.5, **arguments)
    for layout, view in layouts(arguments[name]):
        changed = {**arguments, name: view}
        found = derivative("triton", threshold=THRESHOLD, epsilon=1.5, **changed)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), layout
        inputs = low_level(tuple(changed.values()))  # type: ignore[arg-type]
        saved = _run_forward(*inputs)[1:]
        assert_no_copies(partial(_run_forward, *inputs))
        upstream = torch.ones((), device=kernel_device).expand(2)
        assert_no_copies(partial(_run_backward, upstream, inputs[0], saved, 0.5, True))


def test_no_valid_mask_means_that_all_are_valid(kernel_device: torch.device) -> None:
    cam, category, confidence, valid = case(1, 3, (4, 5), kernel_device)
    everywhere = torch.ones_like(valid)
    found = derivative("triton", cam, category, confidence, THRESHOLD, None)
    expected = derivative("triton", cam, category, confidence, THRESHOLD, everywhere)
    assert found[0] > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_every_element_of_results_and_buffers_is_written(
    kernel_device: torch.device, poisoned: None, scope: str
) -> None:
    results = _run_forward(*low_level(case(2, 3, (5, 9), kernel_device), scope))
    for result in results:
        assert result.isfinite().all() if result.is_floating_point() else (result < 2**31 - 1).all()
    cam = case(2, 3, (5, 9), kernel_device)[0]
    gradient = _run_backward(torch.ones(2, device=kernel_device), cam, results[1:], 0.5, True)
    assert gradient.isfinite().all()


def test_repeated_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    values = case(2, 20, (7, 9), kernel_device)
    first, second = (
        derivative("triton", *values[:3], THRESHOLD, values[3], epsilon=1.5, scope="batch") for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_comes_from_the_sum_of_losses_alone(kernel_device: torch.device) -> None:
    inputs = low_level(case(1, 3, (4, 4), kernel_device))
    sums, *saved = _forward(*inputs)
    assert sums[1] > 1
    alone, both, twice = (
        _backward(torch.tensor(upstream, device=kernel_device), inputs[0], *saved, 0.5, True)
        for upstream in ([1.0, 0.0], [1.0, 5.0], [2.0, 0.0])
    )
    assert alone.ne(0).any()
    assert torch.equal(alone, both)
    assert torch.equal(2 * alone, twice)


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 35),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 8)),
    scope=st.sampled_from(["image", "batch"]),
    similarity=st.sampled_from(["cosine", "dot"]),
    temperature=st.floats(0.2, 2.0),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    batch: int, channels: int, grid: tuple[int, int], scope: str, similarity: str, temperature: float, seed: int
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = case(batch, channels, grid, device, seed)
    parameters = {"epsilon": 1.5, "temperature": temperature, "scope": scope, "similarity": similarity}
    if channels == 1 and similarity == "cosine":  # all cosines are ±1: the gradient is 0, and what is left is rounding
        gradient = derivative("triton", *values[:3], THRESHOLD, values[3], **parameters)[1]
        assert (gradient * values[0]).abs().max() < 1e-6
        return
    tolerance = 1e-5 if similarity == "cosine" else 1e-4  # dot products of 35 channels over 0.2 reach 500
    assert_as_exact(tolerance, *values[:3], THRESHOLD, values[3], **parameters)


def far(tensor: Tensor) -> Tensor:
    """The values of a batch of 4 with images 2^30 elements apart; only the pages that they touch are ever used."""
    base = torch.empty(3 * 2**30 + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
    view = base.as_strided(tensor.shape, (2**30, *tensor.stride()[1:]))
    return view.copy_(tensor)


def test_offsets_beyond_two_to_the_31_reach_their_elements(kernel_device: torch.device) -> None:
    cam, category, confidence, valid = case(4, 2, (2, 3), kernel_device)
    cam, category = cam.half(), category.clamp(max=3).to(torch.uint8)
    expected = derivative("triton", cam, category, confidence, THRESHOLD, valid, epsilon=10.0, scope="batch")
    found = derivative(
        "triton", far(cam), far(category), confidence, THRESHOLD, far(valid), epsilon=10.0, scope="batch"
    )
    assert expected[1][3].ne(0).any()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def loss_of(values: Case, **parameters: Any) -> Callable[[Tensor], Tensor]:
    def loss(cam: Tensor) -> Tensor:
        return contrastive_separation(cam, *values[1:3], THRESHOLD, values[3], backend="triton", **parameters)

    return loss


def test_registration(kernel_device: torch.device) -> None:
    values = case(2, 3, (3, 4), kernel_device)
    inputs = low_level(values)
    torch.library.opcheck(_forward, (inputs[0].requires_grad_(), *inputs[1:]))
    saved = _forward(*inputs)[1:]
    upstream = torch.ones(2, device=kernel_device)
    torch.library.opcheck(_backward, (upstream, inputs[0].detach(), *(each.detach() for each in saved), 0.5, True))
    assert_fullgraph(loss_of(values, epsilon=1.5), values[0].detach())
