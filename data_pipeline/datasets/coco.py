"""COCO: annotations/instances_SPLIT.json beside a folder SPLIT of images."""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import Labels
from cosa_fast.data_pipeline.datasets.layout import Layout
from cosa_fast.data_pipeline.datasets.packed import Pack
from cosa_fast.errors import UserError, first_line, hint
from cosa_fast.files import read_json

_LONGEST_OUTLINE = 1_000_000


@dataclass(frozen=True)
class Instances:
    """What training needs of an instances file. ids, image_ids (COCO's numbers), files: one per image. categories:
    number -> name, in ascending order of the numbers. labels: id -> names.
    """

    path: Path
    ids: list[str]
    image_ids: list[int]
    files: list[str]
    categories: dict[int, str]
    labels: Labels


class CocoDataset(ImageDataset):
    """Its masks are drawn from the polygons of the instances file, which is read again at the first mask: so training
    never holds them.
    """

    def __init__(self, instances: Instances, *args: Any) -> None:
        super().__init__(*args)
        self.has_masks = True
        self._instances = instances

    def check_masks(self) -> None:
        """UserError naming the first annotation whose shape cannot be drawn, and how many there are."""
        categories, problems = self._instances.categories, []
        content = read_json(self._instances.path)  # not kept: training needs none of it
        sizes = _sizes(content)
        for annotation in content["annotations"]:
            image = annotation["image_id"]
            try:
                if image in sizes:
                    check_annotation(annotation, sizes[image], categories)
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                problems.append(f"annotation {annotation.get('id')!r} of image {image!r}: {first_line(error)}"[:200])
        if problems:
            count = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise UserError(f"{self._instances.path}: {problems[0]}{count}; mend the file")

    def _mask_name(self, index: int) -> str:
        return f"{self._instances.path}, image {self._instances.image_ids[index]}"

    def _read_mask(self, index: int) -> np.ndarray:
        number = self._instances.image_ids[index]
        value = {category: self.classes.index(name) + 1 for category, name in self._instances.categories.items()}
        try:
            return rasterise(self._annotations[number], self._image_sizes[number], value)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self._mask_name(index)}: unreadable segmentation ({first_line(error)}); mend the file"
            ) from None

    @cached_property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = read_json(self._instances.path)
        return content

    @cached_property
    def _annotations(self) -> dict[int, list[dict[str, Any]]]:
        return _by_image(self._content["annotations"])

    @cached_property
    def _image_sizes(self) -> dict[int, tuple[Any, Any]]:
        return _sizes(self._content)


def find_coco(root: Path, split: str, classes: Sequence[str] | None, pack: Pack | None) -> Layout:
    """Where the things of a split are: its images with at least one annotation. UserError: no instances file, a damaged
    one, no folder of images, or other class names than the file's.
    """
    instances = read_instances(instances_path(root, split))
    if pack is None and not (root / split).is_dir():
        raise UserError(f"{root / split}: no such folder; unpack the images of {split} there")
    names = tuple(instances.categories.values())
    return Layout(
        ids=instances.ids,
        images=[root / split / name for name in instances.files],
        listing=instances.path,
        classes=names if classes is None else _reordered(classes, names, instances.path),
        annotations=(instances.path, lambda: instances.labels),
        dataset=partial(CocoDataset, instances),
    )


def instances_path(root: Path, split: str) -> Path:
    """ROOT/annotations/instances_SPLIT.json. UserError if it is not there."""
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        known = sorted(p.stem.removeprefix("instances_") for p in path.parent.glob("instances_*.json"))
        raise UserError(
            f"{path}: no such file{hint(split, known)}; unpack the COCO annotations there "
            f"(found splits: {', '.join(known) or 'none'}) or set data.root=... and data.train_split=..."
        )
    return path


def read_instances(path: Path) -> Instances:
    """Images with at least one annotation (crowds included) and the categories that they show. UserError if the file
    has another form or no such image.
    """
    content = read_json(path)
    try:
        categories = {c["id"]: _name(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
        annotations = _by_image(content["annotations"])
        images = [image for image in content["images"] if image["id"] in annotations]
        files = [_name(image["file_name"]) for image in images]
        labels = {
            _id(image): tuple({categories[a["category_id"]]: None for a in annotations[image["id"]]})
            for image in images
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: not a COCO instances file ({problem}); restore it") from None
    if len(set(categories.values())) < len(categories):
        raise UserError(f"{path}: two of its categories have one name; rename one of them")
    if not images:
        raise UserError(f"{path}: no image has an annotation; choose another split")
    return Instances(
        path, [_id(image) for image in images], [image["id"] for image in images], files, categories, labels
    )


def rasterise(annotations: Sequence[dict[str, Any]], size: tuple[int, int], value: dict[int, int]) -> np.ndarray:
    """(H, W) uint8, 0 where nothing is: each annotation's pixels get `value[category_id]`, those of large areas first,
    so that small objects stay visible.

    ValueError, TypeError or KeyError for what `check_annotation` refuses; UserError where pycocotools is missing.
    """
    for annotation in annotations:
        check_annotation(annotation, size, value)
    mask = np.zeros(size, dtype=np.uint8)
    for annotation in sorted(annotations, key=lambda a: -a["area"]):
        shape = annotation["segmentation"]
        inside = _filled(shape, size) if isinstance(shape, list) else _run_lengths(shape, size)
        mask[inside] = value[annotation["category_id"]]
    return mask


def check_annotation(annotation: dict[str, Any], size: tuple[int, int], categories: Container[int]) -> None:
    """ValueError, TypeError, KeyError or OverflowError unless the annotation can be drawn into an image of (height,
    width) `size`. The C library that draws polygons trusts them: null or 1e9 among the coordinates end the process, and
    an odd one gives an empty mask.
    """
    if not all(type(side) is int and side > 0 for side in size) or math.prod(size) > (
        Image.MAX_IMAGE_PIXELS or math.inf
    ):
        raise ValueError(f"the image's height and width are {size[0]!r} and {size[1]!r}")
    if annotation["category_id"] not in categories:
        raise ValueError(f"its category {annotation['category_id']!r} is none of the file's")
    if type(annotation["area"]) not in (int, float) or not math.isfinite(annotation["area"]):
        raise ValueError(f"its area is {annotation['area']!r}")
    shape = annotation["segmentation"]
    if isinstance(shape, list):
        if not shape:
            raise ValueError("it has no polygon")
        for polygon in shape:
            _check_polygon(polygon, size)
    else:
        _counts(shape, size)


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


def _by_image(annotations: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = {}
    for annotation in annotations:
        grouped.setdefault(annotation["image_id"], []).append(annotation)
    return grouped


def _sizes(content: dict[str, Any]) -> dict[int, tuple[Any, Any]]:
    """Image number -> (height, width), unchecked."""
    return {image["id"]: (image.get("height"), image.get("width")) for image in content["images"]}


def _name(value: Any) -> str:
    """ValueError unless it is a text that can name something."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"{str(value)[:50]!r} is no name")
    return value


def _id(image: dict[str, Any]) -> str:
    return PurePosixPath(image["file_name"]).stem


def _reordered(classes: Sequence[str], names: tuple[str, ...], path: Path) -> tuple[str, ...]:
    different = set(classes) ^ set(names)
    if different:
        name = sorted(different)[0]
        raise UserError(
            f"{path}: its categories and data.classes differ, for instance in {name!r}; leave data.classes out"
        )
    return tuple(classes)
