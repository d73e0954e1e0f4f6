"""Classes and confidences laid over an image."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cosa_fast.pictures.palette import colourise

# Black, blue, red, yellow, white: equal steps of brightness, so that the map reads in grey, too.
_HEAT = np.array([(0, 0, 0), (40, 20, 150), (200, 40, 70), (250, 180, 40), (255, 255, 220)], dtype=np.float64)


def overlay(image: Image.Image, classes: np.ndarray, opacity: float = 0.5) -> Image.Image:
    """The RGB image with the (H, W) uint8 foreground classes laid over it; background stays as it is."""
    blended = Image.blend(image, colourise(classes), opacity)
    return Image.composite(blended, image, Image.fromarray(classes > 0))


def heat_map(confidence: np.ndarray, image: Image.Image | None = None) -> Image.Image:
    """(H, W) confidence in [0, 1] as an RGB image from black (0) over red to white (1), mixed with `image` if given."""
    position = np.clip(confidence, 0, 1) * (len(_HEAT) - 1)
    steps = np.arange(len(_HEAT))
    channels = [np.interp(position, steps, _HEAT[:, channel]) for channel in range(3)]
    heat = Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
    return heat if image is None else Image.blend(image, heat, 0.6)
