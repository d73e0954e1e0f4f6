"""M' of one image against the kernels' own fuse_cams."""

import pytest
import torch

from cosa_fast.evaluation.cam import classes_in, normalised_cams, strongest
from cosa_fast.kernels import fuse_cams


@pytest.mark.parametrize("present", [[], [1], [0, 2, 4]])
@pytest.mark.parametrize("size", [(37, 50), (16, 8)])
def test_class_maps_have_the_confidence_and_category_of_fuse_cams(present: list[int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    cams = [torch.randn(2, 5, h, w, generator=generator) for h, w in ((5, 7), (3, 4), (8, 10))]
    labels = torch.zeros(1, 5)
    labels[0, present] = 1
    expected_confidence, expected_category = fuse_cams(cams, labels, size)
    indices = torch.tensor(present, dtype=torch.int64)
    confidence, category = strongest(normalised_cams(cams, indices[None], size)[0], indices)
    torch.testing.assert_close(confidence, expected_confidence[0], rtol=0, atol=1e-6)
    assert torch.equal(category, expected_category[0].long())


def test_class_maps_without_flip_equal_those_with_a_mirrored_copy() -> None:
    cam = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    present = torch.tensor([[0, 2]])
    alone = normalised_cams([cam], present, (20, 31))
    torch.testing.assert_close(alone, normalised_cams([torch.cat([cam, cam.flip(-1)])], present, (20, 31)))


def test_classes_are_those_of_the_mask() -> None:
    mask = torch.tensor([[0, 3, 255], [1, 3, 0]], dtype=torch.uint8)
    assert classes_in(mask).tolist() == [0, 2]


def test_a_wide_mask_may_show_class_255() -> None:
    mask = torch.tensor([[0, 255, 300], [-1, 7, 255]], dtype=torch.int16)
    assert classes_in(mask).tolist() == [6, 254, 299]
    assert classes_in(torch.full((2, 2), -1, dtype=torch.int16)).tolist() == []
