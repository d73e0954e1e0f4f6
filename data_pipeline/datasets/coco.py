"""COCO: an instances file beside folders of images; masks as PNG files, or drawn from the file's shapes."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.instances import (
    Instances,
    by_image,
    find_instances,
    image_sizes,
    read_instances,
)
from cosa_fast.data_pipeline.datasets.layout import Layout
from cosa_fast.data_pipeline.datasets.masks import MaskFiles, find_masks
from cosa_fast.data_pipeline.datasets.packed import Pack
from cosa_fast.data_pipeline.datasets.shapes import check_annotation, covers_nothing, rasterise
from cosa_fast.errors import UserError, counted, first_line
from cosa_fast.files import read_json

MASKS = "SegmentationClass"


class CocoDataset(ImageDataset):
    """Its masks are drawn from the shapes of the instances file, which is read again at the first mask: so training
    never holds them.
    """

    def __init__(self, instances: Instances, *args: Any) -> None:
        super().__init__(*args)
        self.has_masks = instances.shapes
        self._instances = instances

    def check_masks(self, indices: Sequence[int] | None = None, threads: int = 1) -> list[str]:
        """How many annotations cover nothing and are not drawn. UserError naming the first annotation whose shape
        cannot be drawn, and how many there are. Nothing is drawn, and no image is opened.
        """
        if not self.has_masks:
            return []
        categories, problems, empty = self._instances.categories, [], []
        content = read_json(self._instances.path)  # not kept: training needs none of it
        numbers = self._instances.image_ids
        wanted = set(numbers if indices is None else [numbers[index] for index in indices])
        sizes = image_sizes(content)
        for annotation in content["annotations"]:
            image = annotation["image_id"]
            name = f"annotation {annotation.get('id')!r} of image {image!r}"
            try:
                if image in wanted:
                    check_annotation(annotation, sizes[image], categories)
                    empty += [name] if covers_nothing(annotation) else []
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                problems.append(f"{name}: {first_line(error)}"[:200])
        if problems:
            count = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise UserError(f"{self._instances.path}: {problems[0]}{count}; mend the file")
        what = "without a shape, or with a polygon of fewer than three points, which is not drawn"
        return [f"{counted(len(empty), 'annotation')} {what}; the first is {empty[0]}"[:300]] if empty else []

    def _mask_name(self, index: int) -> str:
        return f"{self._instances.path}, image {self._instances.image_ids[index]}"

    def _read_mask(self, index: int) -> np.ndarray:
        if not self.has_masks:
            return super()._read_mask(index)  # which says so
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
        return by_image(self._content["annotations"])

    @cached_property
    def _image_sizes(self) -> dict[int, tuple[Any, Any]]:
        return image_sizes(self._content)


def find_coco(root: Path, split: str, classes: Sequence[str] | None, pack: Pack | None) -> Layout:
    """Where the things of a split are: its images with at least one annotation. UserError: no instances file, a damaged
    one, no folder of images, or other class names than the file's.
    """
    path, found = find_instances(root, split)
    instances = read_instances(path)
    names = tuple(instances.categories.values())
    images = _images(root, found, instances.files) if pack is None else [root / name for name in instances.files]
    masks, strange = _mask_files(root, found, instances.ids)
    notes = [f"{root} has no {split}, {found} is taken"] if found != split else []
    notes += instances.notes
    notes += [f"masks are drawn from {path.name}, for {strange}"] if strange and instances.shapes else []
    if masks.files is None and not instances.shapes:
        notes.append(f"no annotation of {path.name} has a shape, so there are no masks")
    return Layout(
        ids=instances.ids,
        images=images,
        listing=path,
        classes=names if classes is None else _reordered(classes, names, path),
        annotations=(path, lambda some: instances.labels),
        masks=masks,
        dataset=ImageDataset if masks.files else partial(CocoDataset, instances),
        notes=tuple(notes),
    )


def _images(root: Path, split: str, files: Sequence[str]) -> list[Path]:
    """The images that the file names, below the first place where one of them is; of names that begin with folders of
    another machine, the end. UserError if there is no folder of the split.
    """
    own = [root / split, root / "images" / split, root / "JPEGImages" / split, root / split / split]
    for leading in range(max(name.count("/") for name in files[:3]) + 1):
        for place in (*own, root / "images", root / "JPEGImages", root):
            if any((place / _without(name, leading)).is_file() for name in files[:3]):
                return [place / _without(name, leading) for name in files]
    there = next((place for place in own if place.is_dir()), None)
    if there is None:
        raise UserError(f"{root / split}: no such folder; unpack the images of {split} there")
    return [there / name for name in files]


def _without(name: str, leading: int) -> str:
    """The name without so many of its first folders."""
    return name.split("/", leading)[-1]


def _mask_files(root: Path, split: str, ids: Sequence[str]) -> tuple[MaskFiles, str]:
    """(mask files, why those that are there for the split do not count).

    Masks as the field hands them on: SegmentationClass/SPLIT/NAME.png, with or without COCO_SPLIT_ before NAME."""
    own = root / MASKS / split
    names = Counter(id.rpartition("/")[2] for id in ids)

    def also(id: str) -> list[str]:
        name = id.rpartition("/")[2]
        return [name, name.rpartition("_")[2]] if names[name] == 1 else []

    found = find_masks([own if own.is_dir() else root / MASKS], ids, also=also)
    return MaskFiles(found.files), found.absent if own.is_dir() else ""


def _reordered(classes: Sequence[str], names: tuple[str, ...], path: Path) -> tuple[str, ...]:
    different = set(classes) ^ set(names)
    if different:
        name = sorted(different)[0]
        raise UserError(
            f"{path}: its categories and data.classes differ, for instance in {name!r}; leave data.classes out"
        )
    return tuple(classes)
