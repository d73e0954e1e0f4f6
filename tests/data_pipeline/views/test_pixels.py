"""Pixels of the two views: exact geometry, untouched padding, aligned truth."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from cosa_fast.data_pipeline.views.parameters import COLOUR_OPERATIONS, AugmentConfig, AugmentParameters, Box, draw
from cosa_fast.data_pipeline.views.pixels import apply_colour, cut, normalise, render

CONFIG = AugmentConfig(crop_size=96)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return noise.filter(ImageFilter.GaussianBlur(1))


@pytest.mark.parametrize("size", [(120, 80), (80, 120), (500, 375), (31, 7)])
def test_one_resize_with_a_box_equals_scaling_everything_then_cropping(size: tuple[int, int]) -> None:
    image = photograph(*size)
    for position in range(12):
        p = draw(2, position, (image.height, image.width), CONFIG)
        whole = image.resize((p.scaled_size[1], p.scaled_size[0]), Image.Resampling.BILINEAR)
        region = p.region
        expected = whole.crop((region.left, region.top, region.left + region.width, region.top + region.height))
        expected = ImageOps.mirror(expected) if p.flip else expected
        difference = np.asarray(cut(image, p, Image.Resampling.BILINEAR), int) - np.asarray(expected, int)
        # PIL rounds to 8 bits after each of its two passes and holds the box in float32: a tie may fall the other way.
        assert np.abs(difference).max() <= 2
        assert (np.abs(difference) > 1).mean() < 1e-3


def test_padding_is_exactly_zero_and_valid_is_exactly_the_box() -> None:
    image = Image.new("RGB", (40, 60), (200, 30, 90))
    for position in range(40):
        p = draw(4, position, (60, 40), CONFIG)
        views = render(image, np.ones((60, 40), np.uint8), p, CONFIG)
        expected = torch.zeros(96, 96, dtype=torch.bool)
        expected[p.box.top : p.box.top + p.box.height, p.box.left : p.box.left + p.box.width] = True
        assert torch.equal(views.valid, expected)
        for view in (views.weak, views.strong):
            assert view.dtype == torch.float32
            assert (view[:, ~expected] == 0).all()
        assert (views.weak[:, expected] != 0).all()
        assert views.truth is not None
        assert torch.equal(views.truth == 255, ~expected)


def test_identity_leaves_both_views_equal_and_other_operations_do_not() -> None:
    image = photograph(100, 100)
    same = AugmentParameters((100, 100), False, Box(0, 0, 96, 96), Box(0, 0, 96, 96), 0.0, "identity", 5)
    views = render(image, None, same, CONFIG)
    assert torch.equal(views.weak, views.strong)
    assert views.truth is None
    for operation in COLOUR_OPERATIONS[1:]:
        p = AugmentParameters((100, 100), False, same.region, same.box, 0.0, operation, 2)
        changed = render(image, None, p, CONFIG)
        assert torch.equal(changed.weak, views.weak)
        assert not torch.equal(changed.strong, views.weak)


def test_truth_follows_the_image_through_scale_flip_and_crop() -> None:
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 4, (8, 10), dtype=np.uint8), np.ones((16, 16), np.uint8))
    colours = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
    config = AugmentConfig(crop_size=96, blur_probability=0, mean=(0, 0, 0), std=(1, 1, 1))
    for position in range(20):
        p = draw(8, position, mask.shape, config)
        views = render(Image.fromarray(colours[mask]), mask, p, config)
        assert views.truth is not None
        seen = torch.stack([torch.full((96, 96), 0.4), *views.weak]).argmax(0)
        agreement = (seen == views.truth)[views.valid].float().mean()
        assert agreement > 0.95  # interpolated pixels at the borders of cells may differ


def test_magnitudes_mean_what_the_method_says() -> None:
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    values = np.arange(256)
    for m in range(1, 10):
        solarized = np.asarray(apply_colour(ramp, "solarize", m))[0, :, 0]
        assert np.array_equal(solarized, np.where(values < 25.6 * m, values, 255 - values))
        bits = max(1, 4 - int(np.floor(0.4 * m + 1e-9)))
        kept = values & (256 - 2 ** (8 - bits))
        assert np.array_equal(np.asarray(apply_colour(ramp, "posterize", m))[0, :, 0], kept)
        bright = np.asarray(apply_colour(ramp, "brightness", m))[0, :, 0]
        assert np.abs(bright - np.clip(values * (0.1 + 0.18 * m), 0, 255)).max() < 1.01
    with pytest.raises(ValueError, match="rotate"):
        apply_colour(ramp, "rotate", 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_one_pixel_sides_survive_every_operation(size: tuple[int, int]) -> None:
    image = photograph(*size)
    for position in range(40):
        views = render(image, None, draw(0, position, (image.height, image.width), CONFIG), CONFIG)
        assert views.weak.isfinite().all()
        assert views.valid.any()


def test_normalise_is_the_definition() -> None:
    image = photograph(5, 4)
    expected = torch.from_numpy(np.array(image)).double().permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(CONFIG.mean).view(3, 1, 1)) / torch.tensor(CONFIG.std).view(3, 1, 1)
    result = normalise(image, CONFIG.mean, CONFIG.std)
    assert result.shape == (3, 4, 5)
    assert result.is_contiguous()
    assert torch.allclose(result.double(), expected, atol=1e-5)
