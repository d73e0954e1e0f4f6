"""Pixel operations of the two views with PIL (METHOD section 2): the parameters of `parameters.py` applied to one
image.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from cosa_fast.data_pipeline.batch import sent
from cosa_fast.data_pipeline.datasets.masks import IGNORE_INDEX, WIDE_IGNORE_INDEX
from cosa_fast.data_pipeline.views.parameters import COLOUR_OPERATIONS, AugmentConfig, AugmentParameters


@dataclass
class Views:
    """One augmented image: weak and strong (3, H, W) float32, valid (H, W) bool, truth (H, W) uint8 or None."""

    weak: Tensor
    strong: Tensor
    valid: Tensor
    truth: Tensor | None


def render(image: Image.Image, mask: np.ndarray | None, parameters: AugmentParameters, config: AugmentConfig) -> Views:
    """Apply `parameters` to an RGB image and, with the same geometry, to its (H, W) uint8 mask.

    Blur and colour operations see real pixels only, so padding enters no statistics. It is exactly
    `config.padding_values` in both normalised views and 255 in the truth.
    """
    weak = weak_region(image, parameters)
    strong = apply_colour(weak, parameters.operation, parameters.magnitude)
    size = (config.crop_size, config.crop_size)
    inside = _slices(parameters)
    padding = torch.tensor(config.padding_values).view(3, 1, 1)
    weak_canvas, strong_canvas = (padding.repeat(1, *size) for _ in range(2))
    weak_canvas[:, *inside] = normalise(weak, config.mean, config.std)
    strong_canvas[:, *inside] = (
        weak_canvas[:, *inside] if strong is weak else normalise(strong, config.mean, config.std)
    )
    valid = torch.zeros(size, dtype=torch.bool)
    valid[inside] = True
    return Views(weak_canvas, strong_canvas, valid, None if mask is None else render_mask(mask, parameters, config))


def weak_region(image: Image.Image, parameters: AugmentParameters) -> Image.Image:
    """The weak view's real pixels: cut out, mirrored, blurred."""
    region = cut(image, parameters, Image.Resampling.BILINEAR)
    return region.filter(ImageFilter.GaussianBlur(parameters.blur_radius)) if parameters.blur_radius > 0 else region


def cut(image: Image.Image, parameters: AugmentParameters, resample: Image.Resampling) -> Image.Image:
    """Scale, crop and flip in one resize of just the crop's source rectangle: equal to scaling the whole image first,
    without building it.
    """
    top, left, bottom, right = source_rectangle((image.height, image.width), parameters)
    size = (parameters.region.width, parameters.region.height)
    resized = image.resize(size, resample, box=(left, top, right, bottom))
    return ImageOps.mirror(resized) if parameters.flip else resized


def source_rectangle(size: tuple[int, int], parameters: AugmentParameters) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) of what the crop shows of an image of (height, width) `size`, in its pixels."""
    (scaled_height, scaled_width), region = parameters.scaled_size, parameters.region
    step_y, step_x = size[0] / scaled_height, size[1] / scaled_width
    return (
        region.top * step_y,
        region.left * step_x,
        min(size[0], (region.top + region.height) * step_y),
        min(size[1], (region.left + region.width) * step_x),
    )


def apply_colour(image: Image.Image, operation: str, magnitude: int) -> Image.Image:
    """An RGB image after one operation of COLOUR_OPERATIONS with a magnitude in 1..9; after "identity" it is the image
    itself. ValueError for another name.
    """
    factor = enhancement(magnitude)
    match operation:
        case "identity":
            return image
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "solarize":
            return ImageOps.solarize(image, solarize_threshold(magnitude))
        case "posterize":
            return ImageOps.posterize(image, posterize_bits(magnitude))
        case "colour":
            return ImageEnhance.Color(image).enhance(factor)
        case "contrast":
            return ImageEnhance.Contrast(image).enhance(factor)
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(factor)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(factor)
    raise ValueError(f"operation is {operation!r}; wanted one of {', '.join(COLOUR_OPERATIONS)}")


def enhancement(magnitude: int) -> float:
    """The factor of colour, contrast, brightness and sharpness."""
    return 0.1 + 0.18 * magnitude


def solarize_threshold(magnitude: int) -> int:
    """The lowest value that is inverted: PIL compares integers, value < threshold."""
    return ceil(25.6 * magnitude)


def posterize_bits(magnitude: int) -> int:
    """How many of the 8 bits remain."""
    return max(1, 4 - 4 * magnitude // 10)


def normalise(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(3, H, W) float32, contiguous: (image / 255 − mean) / std per channel of an RGB image."""
    return normalise_pixels(torch.from_numpy(np.array(image)), mean, std)


def normalise_pixels(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(..., 3, H, W) float32, contiguous, of (..., H, W, 3) uint8 on any device."""
    values = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    scale, shift = (sent(255 * torch.tensor(each).view(3, 1, 1), pixels.device) for each in (std, mean))
    return values.sub_(shift).div_(scale)


def denormalise_pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What `normalise_pixels` was given, of (..., 3, H, W) float: (..., 3, H, W) uint8."""
    scale, shift = (sent(255 * torch.tensor(each).view(3, 1, 1), images.device) for each in (std, mean))
    return (images * scale + shift).round_().to(torch.uint8)


def render_mask(mask: np.ndarray, parameters: AugmentParameters, config: AugmentConfig) -> Tensor:
    """(H, W) of the mask's type, uint8 or int16: the mask with the geometry of the views; ignored in the padding."""
    wide = mask.dtype == np.int16
    side, ignored = config.crop_size, WIDE_IGNORE_INDEX if wide else IGNORE_INDEX
    canvas = torch.full((side, side), ignored, dtype=torch.int16 if wide else torch.uint8)
    image = Image.fromarray(mask.astype(np.int32) if wide else mask)  # PIL resizes no 16 bits with a sign
    canvas[_slices(parameters)] = torch.from_numpy(np.array(cut(image, parameters, Image.Resampling.NEAREST))).to(
        canvas.dtype
    )
    return canvas


def _slices(parameters: AugmentParameters) -> tuple[slice, slice]:
    box = parameters.box
    return slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
