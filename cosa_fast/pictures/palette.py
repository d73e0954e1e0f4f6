"""The colours of class indices: VOC's for files, others to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cosa_fast.data_pipeline.datasets.masks import voc_palette

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
    """(256, 3) uint8: the colours of PASCAL VOC, in which neighbours differ strongly."""
    return voc_palette()


def shown_palette() -> np.ndarray:
    """(256, 3) uint8: black for background, eight bright colours in turn for the classes, light grey for 255."""
    colours = np.array([(0, 0, 0), *(_SHOWN[index % len(_SHOWN)] for index in range(255))], dtype=np.uint8)
    colours[255] = IGNORED
    return colours


def shown_colours(classes: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: those of `shown_palette` for (H, W) class indices, uint8 (255: ignored) or int16 (-1)."""
    return shown_palette()[_within_palette(classes, len(_SHOWN) * 31)]


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
    return Image.fromarray(palette()[_within_palette(classes, 254)])


def _within_palette(classes: np.ndarray, period: int) -> np.ndarray:
    """Indices of a palette of 256: those of int16 come again after `period` classes, and -1 is the last colour."""
    if classes.dtype != np.int16:
        return classes
    return np.where(classes > 0, (classes - 1) % period + 1, classes)
