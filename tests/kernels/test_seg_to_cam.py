"""seg_to_cam_loss against the full-resolution definition, its gradients, degenerate cases; the resampling below it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosa_fast.kernels import seg_to_cam_loss
from cosa_fast.kernels.reference.resample import ReducedPixels, bilinear_taps, interpolation_matrix


def target_by_hand(
    logits: list[Tensor], labels: Tensor, size: tuple[int, int], grid: tuple[int, int], temperature: float
) -> Tensor:
    """Eq. 7 with every class on the full grid."""
    batch = len(labels)
    summed = torch.zeros(batch, logits[0].shape[1], *size, dtype=torch.float64)
    for scale in logits:
        up = F.interpolate(scale.double(), size=size, mode="bilinear", align_corners=False)
        summed += up[:batch] + up[batch:].flip(-1)
    keep = F.pad(labels > 0, (1, 0), value=True)[:, :, None, None]
    probability = (summed / temperature).masked_fill(~keep, -torch.inf).softmax(1)[:, 1:]
    return F.interpolate(probability, size=grid, mode="bilinear", align_corners=False)


def case(
    batch: int, classes: int, grid: tuple[int, int], size: tuple[int, int], seed: int = 0
) -> tuple[Tensor, list[Tensor], Tensor, tuple[int, int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randn(batch, classes, *grid, generator=generator, dtype=torch.float64)
    logits = [
        torch.randn(2 * batch, classes + 1, *scale, generator=generator, dtype=torch.float64)
        for scale in (grid, (2, 3), (5, 4))
    ]
    labels = (torch.rand(batch, classes, generator=generator) < 0.4).float()
    valid = torch.rand(batch, *size, generator=generator) < 0.95
    return cam, logits, labels, size, valid


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 20, 80])
def test_equals_the_full_resolution_definition(classes: int, relu: bool) -> None:
    cam, logits, labels, size, _ = case(3, classes, (4, 3), (37, 50))
    target = target_by_hand(logits, labels, size, (4, 3), 0.3)
    expected = F.binary_cross_entropy_with_logits(cam.relu() if relu else cam, target)
    loss = seg_to_cam_loss(cam, logits, labels, size, temperature=0.3, relu=relu)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 1000),
)
def test_valid_cells_alone_count_for_every_shape(
    batch: int, classes: int, grid: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    cam, logits, labels, size, valid = case(batch, classes, grid, size, seed)
    loss = seg_to_cam_loss(cam, logits, labels, size, valid, temperature=1.0)
    target = target_by_hand(logits, labels, size, grid, 1.0)
    # A cell is valid where its target reads valid pixels only: invalid ones must have no influence on the reduction.
    invalid = F.interpolate((~valid).double()[:, None], size=grid, mode="bilinear", align_corners=False) > 1e-5
    terms = F.binary_cross_entropy_with_logits(cam, target, reduction="none").masked_fill(invalid, 0)
    expected = terms.sum() / max(int((~invalid).sum()) * classes, 1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_reads_exactly_four_pixels_of_a_sixteenfold_cell() -> None:
    cam, logits, labels = torch.randn(1, 1, 2, 2), [torch.randn(2, 2, 2, 2)], torch.ones(1, 1)
    everything = seg_to_cam_loss(cam, logits, labels, (32, 32))
    valid = torch.zeros(1, 32, 32, dtype=torch.bool)
    read = torch.tensor([7, 8, 23, 24])
    valid[0, read[:, None], read] = True
    torch.testing.assert_close(seg_to_cam_loss(cam, logits, labels, (32, 32), valid), everything)
    valid[0, 8, 23] = False  # belongs to the upper right cell
    target = target_by_hand(logits, labels, (32, 32), (2, 2), 0.01).float()
    terms = F.binary_cross_entropy_with_logits(cam, target, reduction="none").flatten()
    loss = seg_to_cam_loss(cam, logits, labels, (32, 32), valid)
    torch.testing.assert_close(loss, terms[[0, 2, 3]].mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck_of_the_cam(relu: bool) -> None:
    cam, logits, labels, size, valid = case(2, 3, (3, 2), (11, 9))
    torch.autograd.gradcheck(
        lambda value: seg_to_cam_loss(value, logits, labels, size, valid, temperature=0.5, relu=relu),
        cam.requires_grad_(),
    )


def test_teacher_gets_no_gradient() -> None:
    cam, logits, labels, size, valid = case(2, 3, (3, 2), (11, 9))
    leaves = [scale.requires_grad_() for scale in logits]
    assert not seg_to_cam_loss(cam, leaves, labels, size, valid).requires_grad


def test_image_without_a_class_has_target_zero() -> None:
    cam, logits, labels, size, _ = case(1, 3, (3, 2), (11, 9))
    loss = seg_to_cam_loss(cam, logits, labels * 0, size)
    torch.testing.assert_close(loss, F.softplus(cam).mean())


def test_relu_floor_is_ln_2_on_absent_classes() -> None:
    cam = torch.full((1, 2, 3, 3), -5.0, requires_grad=True)
    loss = seg_to_cam_loss(cam, [torch.randn(2, 3, 3, 3)], torch.zeros(1, 2), (6, 6), relu=True)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert cam.grad is not None
    assert cam.grad.eq(0).all()


def test_absent_classes_do_not_matter_even_when_not_finite() -> None:
    cam, logits, labels, size, valid = case(2, 4, (3, 3), (9, 9))
    labels[:, 1] = 0
    expected = seg_to_cam_loss(cam, logits, labels, size, valid)
    for scale in logits:
        scale[:, 2] = torch.nan
    assert torch.equal(seg_to_cam_loss(cam, logits, labels, size, valid), expected)


def test_nothing_valid_gives_loss_and_gradient_zero() -> None:
    cam, logits, labels, size, valid = case(2, 3, (3, 2), (11, 9))
    loss = seg_to_cam_loss(cam.requires_grad_(), logits, labels, size, torch.zeros_like(valid))
    loss.backward()
    assert loss.item() == 0
    assert cam.grad is not None
    assert cam.grad.eq(0).all()


def test_one_valid_cell_counts_alone() -> None:
    cam, logits, labels = torch.randn(1, 2, 2, 2), [torch.randn(2, 3, 2, 2)], torch.ones(1, 2)
    valid = torch.zeros(1, 4, 4, dtype=torch.bool)
    valid[0, 2:, :2] = True
    target = target_by_hand(logits, labels, (4, 4), (2, 2), 1.0).float()
    expected = F.binary_cross_entropy_with_logits(cam[..., 1, 0], target[..., 1, 0])
    torch.testing.assert_close(seg_to_cam_loss(cam, logits, labels, (4, 4), valid, temperature=1.0), expected)


def test_logits_of_ten_thousand_stay_finite() -> None:
    cam = (torch.randn(1, 3, 3, 3).sign() * 1e4).requires_grad_()
    loss = seg_to_cam_loss(cam, [torch.randn(2, 4, 3, 3).sign() * 1e4], torch.ones(1, 3), (12, 12))
    loss.backward()
    assert loss.isfinite()
    assert cam.grad is not None
    assert cam.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    cam, logits, labels, size, valid = case(2, 3, (3, 2), (11, 9))
    cam, logits = cam.to(dtype).requires_grad_(), [scale.to(dtype) for scale in logits]
    loss = seg_to_cam_loss(cam, logits, labels, size, valid)
    (gradient,) = torch.autograd.grad(loss, cam)
    assert gradient.dtype == dtype
    expected = seg_to_cam_loss(cam.detach().float(), [scale.float() for scale in logits], labels, size, valid)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_strides_do_not_matter() -> None:
    cam, logits, labels, size, valid = case(2, 3, (3, 4), (11, 9))
    expected = seg_to_cam_loss(cam, logits, labels, size, valid)
    last = [scale.contiguous(memory_format=torch.channels_last) for scale in logits]
    loss = seg_to_cam_loss(cam.mT.contiguous().mT, last, labels.T.contiguous().T, size, valid.mT.contiguous().mT)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("source", "target"), [(1, 1), (1, 7), (7, 1), (4, 9), (9, 4), (28, 448), (448, 28), (21, 7)])
def test_interpolation_matrix_is_interpolate(source: int, target: int) -> None:
    values = torch.randn(1, 1, source, dtype=torch.float64)
    expected = F.interpolate(values, size=target, mode="linear", align_corners=False)[0, 0]
    matrix = interpolation_matrix(source, target, values.device)
    torch.testing.assert_close(matrix @ values[0, 0], expected, atol=1e-6, rtol=0)


def test_taps_without_weight_are_not_read() -> None:
    taps = bilinear_taps(21, 7, torch.device("cpu"))  # odd ratio: the middle pixel alone
    assert taps.first.tolist() == taps.second.tolist() == [1, 4, 7, 10, 13, 16, 19]
    pixels = ReducedPixels((21, 21), (7, 7), torch.device("cpu"))
    valid = torch.zeros(1, 21, 21, dtype=torch.bool)
    valid[:, 1::3, 1::3] = True
    assert pixels.all_true(valid).all()
