"""Pixel operations of the two views with PIL (METHOD section 2): `augment.py`'s parameters applied to one image."""

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from cosa_fast.data_pipeline.augment import AugmentConfig, AugmentParameters
from cosa_fast.data_pipeline.images import IGNORE_INDEX


@dataclass
class Views:
    """One augmented image: weak and strong (3, H, W) float32, valid (H, W) bool, truth (H, W) uint8 or None."""

    weak: Tensor
    strong: Tensor
    valid: Tensor
    truth: Tensor | None


def render(image: Image.Image, mask: np.ndarray | None, parameters: AugmentParameters, config: AugmentConfig) -> Views:
    """Apply `parameters` to an RGB image and, with the same geometry, to its (H, W) uint8 mask.

    Blur and colour operations see only real pixels, so padding enters no statistics; it is exactly 0 in both normalised
    views and 255 in the truth.
    """
    weak = cut(image, parameters, Image.Resampling.BILINEAR)
    if parameters.blur_radius > 0:
        weak = weak.filter(ImageFilter.GaussianBlur(parameters.blur_radius))
    strong = apply_colour(weak, parameters.operation, parameters.magnitude)
    size = (config.crop_size, config.crop_size)
    inside = _slices(parameters)
    weak_canvas, strong_canvas = torch.zeros(3, *size), torch.zeros(3, *size)
    weak_canvas[:, *inside] = normalise(weak, config.mean, config.std)
    strong_canvas[:, *inside] = (
        weak_canvas[:, *inside] if strong is weak else normalise(strong, config.mean, config.std)
    )
    valid = torch.zeros(size, dtype=torch.bool)
    valid[inside] = True
    return Views(weak_canvas, strong_canvas, valid, None if mask is None else _render_mask(mask, parameters, size))


def cut(image: Image.Image, parameters: AugmentParameters, resample: Image.Resampling) -> Image.Image:
    """Scale, crop and flip in one resize of just the crop's source rectangle: equal to scaling the whole image first,
    without building it.
    """
    (scaled_height, scaled_width), region = parameters.scaled_size, parameters.region
    step_x, step_y = image.width / scaled_width, image.height / scaled_height
    source = (
        region.left * step_x,
        region.top * step_y,
        min(image.width, (region.left + region.width) * step_x),
        min(image.height, (region.top + region.height) * step_y),
    )
    resized = image.resize((region.width, region.height), resample, box=source)
    return ImageOps.mirror(resized) if parameters.flip else resized


def apply_colour(image: Image.Image, operation: str, magnitude: int) -> Image.Image:
    """One colour operation of `augment.COLOUR_OPERATIONS` on an RGB image, magnitude 1..9; "identity" returns the image
    itself. ValueError for another name.
    """
    factor = 0.1 + 0.18 * magnitude
    match operation:
        case "identity":
            return image
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "solarize":
            return ImageOps.solarize(image, ceil(25.6 * magnitude))  # PIL compares integers: value < threshold
        case "posterize":
            return ImageOps.posterize(image, max(1, 4 - 4 * magnitude // 10))
        case "colour":
            return ImageEnhance.Color(image).enhance(factor)
        case "contrast":
            return ImageEnhance.Contrast(image).enhance(factor)
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(factor)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(factor)
    raise ValueError(f"operation is {operation!r}; wanted one of augment.COLOUR_OPERATIONS")


def normalise(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(3, H, W) float32, contiguous: (image / 255 − mean) / std per channel of an RGB image."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    scale = 255 * torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
    shift = 255 * torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
    return values.sub_(shift).div_(scale)


def _render_mask(mask: np.ndarray, parameters: AugmentParameters, size: tuple[int, int]) -> Tensor:
    canvas = torch.full(size, IGNORE_INDEX, dtype=torch.uint8)
    canvas[_slices(parameters)] = torch.from_numpy(
        np.array(cut(Image.fromarray(mask), parameters, Image.Resampling.NEAREST))
    )
    return canvas


def _slices(parameters: AugmentParameters) -> tuple[slice, slice]:
    box = parameters.box
    return slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
