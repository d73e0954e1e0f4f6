"""The colours of class indices."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cosa_fast.data_pipeline.datasets.masks import voc_palette


def palette() -> np.ndarray:
    """(256, 3) uint8: the colours of PASCAL VOC, in which neighbours differ strongly."""
    return voc_palette()


def palette_image(classes: np.ndarray) -> Image.Image:
    """A palette image whose pixel values are the (H, W) uint8 class indices themselves."""
    image = Image.fromarray(np.ascontiguousarray(classes, dtype=np.uint8), mode="L")
    image.putpalette(palette().tobytes())
    return image


def colourise(classes: np.ndarray) -> Image.Image:
    """(H, W) uint8 class indices (255: ignored) as an RGB image in the palette's colours."""
    return Image.fromarray(palette()[classes])
