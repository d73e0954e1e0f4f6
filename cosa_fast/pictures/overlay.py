"""Classes, confidences, perplexities laid over an image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cosa_fast.pictures.palette import shown_colours

# Black, blue, red, yellow, white: equal steps of brightness, so that the map reads in grey, too.
_HEAT = np.array([(0, 0, 0), (40, 20, 150), (200, 40, 70), (250, 180, 40), (255, 255, 220)], dtype=np.float64)
OPACITY = 0.55


def overlay(
    image: Image.Image, classes: np.ndarray, names: Sequence[str] | None = None, opacity: float = OPACITY
) -> Image.Image:
    """The RGB image with the (H, W) foreground classes laid over it, outlined; background stays as it is.

    names: of the classes 1.., written into their regions. What is ignored (255, in int16 -1) becomes light grey,
    without a name.
    """
    colours = shown_colours(classes)
    pixels = np.array(image, dtype=np.float64)
    foreground = classes != 0
    pixels[foreground] += opacity * (colours[foreground] - pixels[foreground])
    edge = _edges(classes, max(1, round(max(image.size) / 350)))
    # Bright inside and dark outside: one of the two shows on any ground.
    pixels[edge & foreground] = colours[edge & foreground]
    pixels[edge & ~foreground] *= 0.35
    result = Image.fromarray(pixels.round().astype(np.uint8))
    if names is not None:
        _write_names(result, classes, names)
    return result


def class_map(image: Image.Image, confidence: np.ndarray, category: np.ndarray) -> Image.Image:
    """A CAM over the image in grey: (H, W) confidence in [0, 1] as the opacity of its category's colour."""
    grey = np.array(image.convert("L").convert("RGB"), dtype=np.float64)
    colours = shown_colours(category.astype(np.int16))
    weight = np.where(category > 0, np.clip(confidence, 0, 1), 0)[..., None]
    return Image.fromarray((grey + weight * (colours - grey)).round().astype(np.uint8))


def heat_map(confidence: np.ndarray, image: Image.Image | None = None) -> Image.Image:
    """(H, W) confidence in [0, 1] as an RGB image from black (0) over red to white (1), mixed with `image` if given."""
    position = np.clip(confidence, 0, 1) * (len(_HEAT) - 1)
    steps = np.arange(len(_HEAT))
    channels = [np.interp(position, steps, _HEAT[:, channel]) for channel in range(3)]
    heat = Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
    return heat if image is None else Image.blend(image, heat, 0.6)


def selection(image: Image.Image, chosen: np.ndarray) -> Image.Image:
    """The image where (H, W) `chosen` is true, nearly black elsewhere."""
    pixels = np.array(image, dtype=np.float64)
    pixels[~chosen] *= 0.15
    return Image.fromarray(pixels.round().astype(np.uint8))


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The one that matplotlib brings along, which has ξ, Ω and †."""
    import matplotlib  # here: training is possible without it

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _edges(classes: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels with another class within `width` pixels."""
    _, numbers = np.unique(classes, return_inverse=True)
    map_ = Image.fromarray(numbers.reshape(classes.shape).astype(np.uint8), mode="L")
    size = 2 * width + 1
    return np.array(map_.filter(ImageFilter.MaxFilter(size))) != np.array(map_.filter(ImageFilter.MinFilter(size)))


def _write_names(image: Image.Image, classes: np.ndarray, names: Sequence[str]) -> None:
    draw, letters = ImageDraw.Draw(image), font(max(11, round(max(image.size) / 28)))
    ignored = -1 if classes.dtype == np.int16 else 255
    for index in sorted(set(np.unique(classes).tolist()) - {0, ignored}):
        rows, columns = np.nonzero(classes == index)
        nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        left, top, right, bottom = draw.textbbox((0, 0), names[index - 1], font=letters)
        x = int(np.clip(columns[nearest] - right / 2, 2, max(2, image.width - right - 2)))
        y = int(np.clip(rows[nearest] - bottom / 2, 2, max(2, image.height - bottom - 2)))
        draw.rectangle((x + left - 2, y + top - 2, x + right + 2, y + bottom + 2), fill="black")
        draw.text((x, y), names[index - 1], fill="white", font=letters)
