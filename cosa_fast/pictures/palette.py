"""The colours of class indices."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cosa_fast.data_pipeline.datasets.masks import voc_palette


def palette() -> np.ndarray:
    """(256, 3) uint8: the colours of PASCAL VOC, in which neighbours differ strongly."""
    return voc_palette()


def palette_image(classes: np.ndarray) -> Image.Image:
    """An image whose pixel values are the (H, W) class indices themselves: a palette image of uint8, 16-bit grayscale
    of int16."""
    if classes.dtype == np.int16:
        return Image.fromarray(classes.astype(np.uint16))
    image = Image.fromarray(np.ascontiguousarray(classes, dtype=np.uint8), mode="L")
    image.putpalette(palette().tobytes())
    return image


def colourise(classes: np.ndarray) -> Image.Image:
    """(H, W) class indices as an RGB image in the palette's colours: uint8 (255: ignored), or int16 (-1: ignored),
    whose colours come again after 254 classes."""
    if classes.dtype == np.int16:
        classes = np.where(classes > 0, (classes - 1) % 254 + 1, classes)  # -1 is the last colour, that of 255
    return Image.fromarray(palette()[classes])
