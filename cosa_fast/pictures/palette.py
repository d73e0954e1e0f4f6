"""The colours of class indices."""

from __future__ import annotations

import numpy as np
from PIL import Image


def palette() -> np.ndarray:
    """(256, 3) uint8: the colours of PASCAL VOC.

    Bit j of red, green, blue, counted from the top, is bit 3j, 3j + 1, 3j + 2 of the index: neighbours differ strongly.
    """
    index = np.arange(256)[:, None]
    channel = np.arange(3)[None, :]
    bits = np.arange(8)
    return ((((index[..., None] >> (3 * bits + channel[..., None])) & 1) << (7 - bits)).sum(-1)).astype(np.uint8)


def palette_image(classes: np.ndarray) -> Image.Image:
    """A palette image whose pixel values are the (H, W) uint8 class indices themselves."""
    image = Image.fromarray(np.ascontiguousarray(classes, dtype=np.uint8), mode="L")
    image.putpalette(palette().tobytes())
    return image


def colourise(classes: np.ndarray) -> Image.Image:
    """(H, W) uint8 class indices (255: ignored) as an RGB image in the palette's colours."""
    return Image.fromarray(palette()[classes])
