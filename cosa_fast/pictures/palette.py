"""The colours of class indices: VOC's for files, others to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Laid over black and brown fur, light and dark skin, grass and sky they stay visible, and they keep apart for eyes
# without red, green or blue cones (tests/pictures/test_pictures.py). More than eight cannot: classes share them.
_SHOWN = (
    (0, 0, 255),
    (255, 255, 0),
    (255, 51, 153),
    (0, 204, 51),
    (102, 255, 255),
    (153, 102, 255),
    (51, 153, 204),
    (153, 0, 153),
)
IGNORED = (225, 225, 225)


def palette() -> np.ndarray:
    """(256, 3) uint8: the colours of PASCAL VOC.

    Bit j of red, green, blue, counted from the top, is bit 3j, 3j + 1, 3j + 2 of the index: neighbours differ strongly.
    """
    index = np.arange(256)[:, None]
    channel = np.arange(3)[None, :]
    bits = np.arange(8)
    return ((((index[..., None] >> (3 * bits + channel[..., None])) & 1) << (7 - bits)).sum(-1)).astype(np.uint8)


def shown_palette() -> np.ndarray:
    """(256, 3) uint8: black for background, eight bright colours in turn for the classes, light grey for 255."""
    colours = np.array([(0, 0, 0), *(_SHOWN[index % len(_SHOWN)] for index in range(255))], dtype=np.uint8)
    colours[255] = IGNORED
    return colours


def palette_image(classes: np.ndarray) -> Image.Image:
    """A palette image whose pixel values are the (H, W) uint8 class indices themselves."""
    image = Image.fromarray(np.ascontiguousarray(classes, dtype=np.uint8), mode="L")
    image.putpalette(palette().tobytes())
    return image


def colourise(classes: np.ndarray) -> Image.Image:
    """(H, W) uint8 class indices (255: ignored) as an RGB image in VOC's colours."""
    return Image.fromarray(palette()[classes])
