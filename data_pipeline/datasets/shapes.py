"""COCO's shapes: polygons and run lengths, checked and drawn."""

import math
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cosa_fast.data_pipeline.datasets.masks import mask_type
from cosa_fast.errors import UserError

_LONGEST_OUTLINE = 1_000_000


def rasterise(annotations: Sequence[dict[str, Any]], size: tuple[int, int], value: dict[int, int]) -> np.ndarray:
    """(H, W) of the type that masks of so many classes have, 0 where nothing is: each annotation's pixels get
    `value[category_id]`, those of large areas first, so that small objects stay visible. An annotation without a shape
    changes nothing.

    ValueError, TypeError or KeyError for what `check_annotation` refuses; UserError where pycocotools is missing.
    """
    for annotation in annotations:
        check_annotation(annotation, size, value)
    mask = np.zeros(size, dtype=mask_type(max(value.values(), default=0)))
    drawn = [(annotation, shape) for annotation in annotations if (shape := shape_of(annotation)) is not None]
    for annotation, shape in sorted(drawn, key=lambda pair: -_area(pair[0], pair[1], size)):
        inside = _filled(shape, size) if isinstance(shape, list) else _run_lengths(shape, size)
        mask[inside] = value[annotation["category_id"]]
    return mask


def shape_of(annotation: dict[str, Any]) -> Any:
    """The annotation's segmentation without its empty polygons and those of one or two points, which cover nothing;
    None if nothing is left. A flat list of coordinates is one polygon.
    """
    shape = annotation.get("segmentation")
    if isinstance(shape, list):
        if shape and {*map(type, shape)} <= {int, float}:
            shape = [shape]
        shape = [polygon for polygon in shape if not (isinstance(polygon, list) and len(polygon) in (0, 2, 4))]
    return shape or None


def covers_nothing(annotation: dict[str, Any]) -> bool:
    """Whether the annotation, or a polygon of it, is one that is not drawn."""
    shape, given = shape_of(annotation), annotation.get("segmentation")
    return shape is None or (isinstance(given, list) and {*map(type, given)} == {list} and len(shape) < len(given))


def check_annotation(annotation: dict[str, Any], size: tuple[int, int], categories: Container[int]) -> None:
    """ValueError, TypeError, KeyError or OverflowError unless the annotation can be drawn into an image of (height,
    width) `size`, or has no shape. The C library that draws polygons trusts them: null or 1e9 among the coordinates end
    the process, and an odd one gives an empty mask.
    """
    if not all(type(side) is int and side > 0 for side in size) or math.prod(size) > (
        Image.MAX_IMAGE_PIXELS or math.inf
    ):
        raise ValueError(f"the image's height and width are {size[0]!r} and {size[1]!r}")
    if annotation["category_id"] not in categories:
        raise ValueError(f"its category {annotation['category_id']!r} is none of the file's")
    area = annotation.get("area")
    if area is not None and (type(area) not in (int, float) or not math.isfinite(area)):
        raise ValueError(f"its area is {area!r}")
    shape = shape_of(annotation)
    if isinstance(shape, list):
        for polygon in shape:
            _check_polygon(polygon, size)
    elif shape is not None:
        _counts(shape, size)


def _area(annotation: dict[str, Any], shape: Any, size: tuple[int, int]) -> float:
    """In pixels: as the file says; where it does not, of the run lengths, or of the polygons by their corners."""
    area = annotation.get("area")
    if area is not None:
        return float(area)
    return _polygons_area(shape) if isinstance(shape, list) else float(sum(_counts(shape, size)[1::2]))


def _polygons_area(polygons: list[list[float]]) -> float:
    total = 0.0
    for polygon in polygons:
        x, y = np.array(polygon[::2], float), np.array(polygon[1::2], float)
        total += abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
    return total


def _check_polygon(polygon: Any, size: tuple[int, int]) -> None:
    if not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}:
        raise ValueError("a polygon is no list of numbers")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"a polygon has {len(polygon)} coordinates; wanted an even number, at least 6")
    if not math.isfinite(sum(polygon)):
        raise ValueError("a coordinate is not finite")
    corners = [*zip(polygon[::2], polygon[1::2], strict=True)]
    for coordinates, side in ((polygon[::2], size[1]), (polygon[1::2], size[0])):
        if min(coordinates) < -side or max(coordinates) > 2 * side:
            raise ValueError("a coordinate lies far outside the image")
    # The library takes 40 bytes for each pixel of the outline.
    if len(corners) * 3 * max(size) > _LONGEST_OUTLINE and _outline(corners) > _LONGEST_OUTLINE:
        raise ValueError(f"the outline of a polygon is longer than {_LONGEST_OUTLINE} pixels")


def _outline(corners: list[tuple[float, float]]) -> float:
    pairs = zip(corners, corners[1:] + corners[:1], strict=True)
    return sum(max(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in pairs)


def _filled(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of polygons that have been checked."""
    codec = _mask_codec()
    filled: np.ndarray = codec.decode(codec.merge(codec.frPyObjects(polygons, *size))).astype(bool)
    return filled


def _run_lengths(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a run-length encoding: runs of 0 and of 1 in turn, down one column after another."""
    counts = _counts(shape, size)
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size[1], size[0]).T


def _counts(shape: Any, size: tuple[int, int]) -> list[int]:
    """The run lengths; ValueError unless they make up the whole image."""
    counts = shape["counts"]
    counts = _uncompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(counts, list) or not {*map(type, counts)} <= {int}:
        raise ValueError("its counts are no list of whole numbers")
    if list(shape["size"]) != list(size) or min(counts, default=-1) < 0 or sum(counts) != math.prod(size):
        raise ValueError(f"its counts do not make up an image of {size[1]}x{size[0]}")
    return counts


def _uncompressed(text: str) -> list[int]:
    """COCO's compact form of counts: 5 bits a character, the lowest first, bit 6 for "more follow" and the sign in the
    last one's highest; from the fourth on, each is the difference to the last but one.
    """
    counts: list[int] = []
    number = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("its compressed counts are damaged")
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (bits >> 4 & 1) << shift
            counts.append(number + counts[-2] if len(counts) > 2 else number)
            number = shift = 0
    if shift:
        raise ValueError("its compressed counts end too early")
    return counts


def _mask_codec() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("COCO masks need pycocotools; install it with: pip install 'cosa_fast[coco]'") from None
    return mask
