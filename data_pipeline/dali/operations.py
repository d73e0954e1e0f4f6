"""Pixel operations of the two views with DALI: what `views/pixels.py` does with PIL, as pieces of a DALI graph.

Images are (height, width, 3) uint8 DataNodes, on the CPU or on a GPU. Parameters are CPU DataNodes with one value,
vector or kernel per image. docs/data.md says how far each operation is from PIL's, and why.
"""

from math import sqrt
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types

from cosa_fast.data_pipeline.views.parameters import COLOUR_OPERATIONS, AugmentConfig

# PIL cuts fractions off, DALI rounds: so this is subtracted before. It is a hair less than a half, because float32 may
# hold a whole number as slightly less.
_CUT = 0.499
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # PIL's ImageFilter.SMOOTH
_IDENTITY = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])


def decode(encoded: Any, gpu: bool) -> Any:
    """The RGB image in an encoded file, as stored: an EXIF orientation is not obeyed."""
    return fn.decoders.image(
        encoded,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # as libjpeg-turbo does, which PIL uses
    )


def cut(image: Any, start: Any, end: Any, size: Any) -> Any:
    """Scale, crop and flip in one antialiased resize of the rectangle from `start` to `end` ((y, x) in pixels; mirrored
    where end < start) to `size`.
    """
    return fn.resize(
        image, roi_start=start, roi_end=end, size=size, interp_type=types.INTERP_TRIANGULAR, antialias=True
    )


def blur(image: Any, blurred: Any, row: Any, column: Any) -> Any:
    """The image filtered by a (1, n) and an (n, 1) kernel where `blurred`. Several times as fast as DALI's Gaussian
    blur, and nearer to PIL's.
    """
    if blurred:  # noqa: SIM108 - DALI knows statements only
        result = _filter(_filter(image, row), column)
    else:
        result = image
    return result


def blur_kernel(radius: float) -> np.ndarray:
    """(n,) float32: PIL's Gaussian blur, which is three box filters of real width (Gwosdek et al., 2011), as one
    filter; [1] for radius 0.
    """
    variance = radius * radius / 3
    whole = int((sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([edge, *[1.0] * (2 * whole + 1), edge]) / (2 * (whole + edge) + 1)
    kernel = np.convolve(np.convolve(box, box), box) if radius > 0 else np.ones(1)
    return kernel.astype(np.float32)


def sharpness_kernel(factor: float) -> np.ndarray:
    """(3, 3) float32: factor 0 smoothes, 1 changes nothing, more sharpens."""
    return (factor * _IDENTITY + (1 - factor) * _SMOOTH).astype(np.float32)


def apply_colour(image: Any, operation: Any, factor: Any, threshold: Any, bits: Any, kernel: Any) -> Any:
    """The colour operation with number `operation` in COLOUR_OPERATIONS.

    factor: float32, of colour, contrast and brightness. threshold: uint8, the lowest value that solarize inverts.
    bits: uint8, those that posterize keeps. kernel: of sharpness.
    """
    if operation == COLOUR_OPERATIONS.index("autocontrast"):
        changed = autocontrast(image)
    elif operation == COLOUR_OPERATIONS.index("equalize"):
        # Inverted, DALI's definition, which counts the pixels up to and including a value, becomes PIL's.
        changed = _invert(fn.equalize(_invert(image)))
    elif operation == COLOUR_OPERATIONS.index("solarize"):
        changed = image ^ ((image >= _beside(image, threshold)) * types.Constant(255, dtype=types.UINT8))
    elif operation == COLOUR_OPERATIONS.index("colour"):
        changed = _blend(_grey(image), image, _beside(image, factor))
    elif operation == COLOUR_OPERATIONS.index("contrast"):
        mean = fn.reductions.mean(_grey(image), axes=(0, 1, 2), keep_dims=True)
        changed = _blend(math.floor(mean + 0.5), image, _beside(image, factor))
    elif operation == COLOUR_OPERATIONS.index("brightness"):
        changed = fn.brightness(image, brightness=factor, brightness_shift=-_CUT / 255)
    elif operation == COLOUR_OPERATIONS.index("sharpness"):
        changed = _filter(image, kernel)
    elif operation == COLOUR_OPERATIONS.index("posterize"):
        changed = image & _beside(image, bits)
    else:
        changed = image
    return changed


def autocontrast(image: Any) -> Any:
    """Each channel's lowest value becomes 0, its highest 255; a channel of one value stays."""
    low = fn.reductions.min(image, axes=(0, 1), keep_dims=True)
    high = fn.reductions.max(image, axes=(0, 1), keep_dims=True)
    flat = high == low
    scale = 255.0 / (fn.cast(high - low, dtype=types.FLOAT) + flat * 255.0)
    return _to_uint8(image * scale - low * scale * (1.0 - flat))


def to_crop(image: Any, position: Any, config: AugmentConfig) -> Any:
    """(3, crop, crop) float32: normalised, placed in a crop that is exactly `config.padding_values` elsewhere.

    position: (y, x), the place as a share of the padding (0 where there is none).
    """
    return fn.crop_mirror_normalize(
        image,
        crop=(config.crop_size, config.crop_size),
        crop_pos_y=position[0],
        crop_pos_x=position[1],
        out_of_bounds_policy="pad",
        fill_values=list(config.padding_values),
        mean=[255 * value for value in config.mean],
        std=[255 * value for value in config.std],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def _blend(low: Any, image: Any, factor: Any) -> Any:
    """PIL's enhancement: `low` for factor 0, the image for 1."""
    return _to_uint8(image * factor + low * (1.0 - factor))


def _to_uint8(values: Any) -> Any:
    return fn.cast(values - _CUT, dtype=types.UINT8)


def _invert(image: Any) -> Any:
    return image ^ types.Constant(255, dtype=types.UINT8)


def _grey(image: Any) -> Any:
    return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)


def _filter(image: Any, kernel: Any) -> Any:
    return fn.filter(image, _beside(image, kernel), border="clamp")


def _beside(image: Any, parameter: Any) -> Any:
    """The parameter on the image's device: arithmetic does not mix devices."""
    return parameter.gpu() if image.device == "gpu" else parameter
