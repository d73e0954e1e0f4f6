"""fuse_cams against a definition written class by class, and its degenerate cases."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosa_fast.kernels import fuse_cams


def fuse_by_hand(cams: list[Tensor], labels: Tensor, size: tuple[int, int], valid: Tensor) -> tuple[Tensor, Tensor]:
    """METHOD section 3 as it reads, every class upsampled, image by image."""
    batch, classes = labels.shape
    confidence, category = torch.zeros(batch, *size, dtype=torch.float64), torch.zeros(batch, *size, dtype=torch.uint8)
    for b in range(batch):
        best = torch.full(size, -1.0, dtype=torch.float64)
        for c in range(classes):
            if labels[b, c] == 0 or not valid[b].any():
                continue
            total = torch.zeros(size, dtype=torch.float64)
            for cam in cams:
                up = F.interpolate(cam.double(), size=size, mode="bilinear", align_corners=False)
                total += torch.maximum(up[b, c], up[batch + b, c].flip(-1)).clamp(min=0)
            low, high = total[valid[b]].min(), total[valid[b]].max()
            score = (total - low) / (high - low + 1e-5)
            better = (score > best) & valid[b]
            best[better] = score[better]
            category[b][better] = c + 1
            confidence[b][better] = score[better]
    return confidence, category


def case(batch: int, classes: int, grids: list[tuple[int, int]], size: tuple[int, int], seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    cams = [torch.randn(2 * batch, classes, *grid, generator=generator) for grid in grids]
    labels = (torch.rand(batch, classes, generator=generator) < 0.4).float()
    valid = torch.rand(batch, *size, generator=generator) < 0.8
    return cams, labels, size, valid


@pytest.mark.parametrize("classes", [1, 2, 20, 80])
def test_equals_the_definition_at_ragged_sizes(classes: int) -> None:
    cams, labels, size, valid = case(3, classes, [(5, 4), (2, 3), (7, 6)], (17, 13))
    confidence, category = fuse_cams([cam.double() for cam in cams], labels, size, valid)
    expected, expected_category = fuse_by_hand(cams, labels, size, valid)
    torch.testing.assert_close(confidence, expected, atol=1e-12, rtol=0)
    assert torch.equal(category, expected_category)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 1000),
)
def test_range_and_gating_hold_for_every_shape(
    batch: int, classes: int, grid: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    cams, labels, size, valid = case(batch, classes, [grid, (3, 2)], size, seed)
    confidence, category = fuse_cams(cams, labels, size, valid)
    expected, _ = fuse_by_hand(cams, labels, size, valid)
    assert confidence.dtype == torch.float32
    assert category.dtype == torch.uint8
    assert ((confidence >= 0) & (confidence <= 1)).all()
    exact, _ = fuse_cams([cam.double() for cam in cams], labels, size, valid)
    torch.testing.assert_close(exact, expected, atol=1e-9, rtol=0)
    present = torch.cat((torch.ones(batch, 1), labels), 1).gather(1, category.long().flatten(1))
    assert (present > 0).all()


def test_hand_computed_min_max() -> None:
    cam = torch.tensor([[[[-1.0, 1.0, 3.0]]], [[[5.0, 0.0, -2.0]]]])  # flipped back: -2, 0, 5
    confidence, category = fuse_cams([cam], torch.ones(1, 1), (1, 3))
    torch.testing.assert_close(confidence, torch.tensor([[[0.0, 1.0, 5.0]]]) / (5 + 1e-5))
    assert (category == 1).all()


def test_padding_enters_no_extreme_and_is_zero() -> None:
    cam = torch.tensor([0.0, 1.0, 2.0, 100.0]).view(1, 1, 1, 4)
    valid = torch.tensor([[[False, True, True, False]]])
    confidence, category = fuse_cams([torch.cat((cam, cam.flip(-1)))], torch.ones(1, 1), (1, 4), valid)
    torch.testing.assert_close(confidence, torch.tensor([[[0.0, 0.0, 1 / (1 + 1e-5), 0.0]]]))
    assert category.flatten().tolist() == [0, 1, 1, 0]


def test_no_present_class_and_nothing_valid_give_zero() -> None:
    cams = [torch.randn(4, 3, 2, 2)]
    labels = torch.tensor([[0, 0, 0], [1, 0, 1]])
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    confidence, category = fuse_cams(cams, labels, (4, 4), valid)
    assert confidence[0].eq(0).all()
    assert category[0].eq(0).all()
    assert set(category[1].unique().tolist()) <= {1, 3}
    for output in fuse_cams(cams, labels, (4, 4), ~valid) + fuse_cams(cams, labels * 0, (4, 4)):
        assert output.eq(0).all()


def test_constant_map_has_confidence_zero_and_the_lowest_present_class() -> None:
    confidence, category = fuse_cams([torch.full((2, 3, 2, 2), 7.0)], torch.tensor([[0, 1, 1]]), (4, 4))
    assert confidence.eq(0).all()
    assert category.eq(2).all()


def test_one_valid_pixel() -> None:
    valid = torch.zeros(1, 4, 4, dtype=torch.bool)
    valid[0, 1, 2] = True
    confidence, category = fuse_cams([torch.randn(2, 2, 2, 2)], torch.ones(1, 2), (4, 4), valid)
    assert confidence.eq(0).all()
    assert category[valid].item() == 1


def test_absent_classes_do_not_matter_even_when_not_finite() -> None:
    cams, labels, size, valid = case(2, 4, [(3, 3)], (8, 8))
    labels[:, 1] = 0
    expected = fuse_cams(cams, labels, size, valid)
    cams[0][:, 1] = torch.nan
    for output, wanted in zip(fuse_cams(cams, labels, size, valid), expected, strict=True):
        assert torch.equal(output, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    cams, labels, size, valid = case(2, 3, [(4, 4), (2, 2)], (9, 9))
    cams = [cam.to(dtype) for cam in cams]
    expected = fuse_cams([cam.float() for cam in cams], labels, size, valid)
    for output, wanted in zip(fuse_cams(cams, labels, size, valid), expected, strict=True):
        assert torch.equal(output, wanted)


def test_strides_do_not_matter_and_no_gradient_is_kept() -> None:
    cams, labels, size, valid = case(2, 3, [(4, 6)], (9, 9))
    strided = [torch.stack((cam, cam), -1)[..., 0].to(memory_format=torch.preserve_format) for cam in cams]
    last = [cam.contiguous(memory_format=torch.channels_last).requires_grad_() for cam in cams]
    expected = fuse_cams(cams, labels, size, valid)
    for variant in (strided, last):
        outputs = fuse_cams(variant, labels, size, valid.mT.contiguous().mT)
        assert not outputs[0].requires_grad
        assert torch.equal(outputs[0], expected[0])
        assert torch.equal(outputs[1], expected[1])
