"""COCO: annotations/instances_SPLIT.json beside a folder SPLIT of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import Labels
from cosa_fast.data_pipeline.datasets.layout import Layout
from cosa_fast.data_pipeline.datasets.packed import Pack
from cosa_fast.errors import UserError, hint
from cosa_fast.files import read_json


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

    def _mask_name(self, index: int) -> str:
        return f"{self._instances.path}, image {self._instances.image_ids[index]}"

    def _read_mask(self, index: int) -> np.ndarray:
        number = self._instances.image_ids[index]
        value = {category: self.classes.index(name) + 1 for category, name in self._instances.categories.items()}
        try:
            return rasterise(self._annotations[number], self._sizes[number], value)
        except UserError:
            raise
        except Exception as error:  # the C extension reports damaged polygons in many ways
            raise UserError(f"{self._mask_name(index)}: unreadable segmentation ({error}); mend the file") from None

    @cached_property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = read_json(self._instances.path)
        return content

    @cached_property
    def _annotations(self) -> dict[int, list[dict[str, Any]]]:
        return _by_image(self._content["annotations"])

    @cached_property
    def _sizes(self) -> dict[int, tuple[int, int]]:
        return {image["id"]: (image["height"], image["width"]) for image in self._content["images"]}


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
        categories = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
        annotations = _by_image(content["annotations"])
        images = [image for image in content["images"] if image["id"] in annotations]
        files = [image["file_name"] for image in images]
        labels = {
            _id(image): tuple({categories[a["category_id"]]: None for a in annotations[image["id"]]})
            for image in images
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a COCO instances file ({type(error).__name__}: {error}); restore it") from None
    if not images:
        raise UserError(f"{path}: no image has an annotation; choose another split")
    return Instances(
        path, [_id(image) for image in images], [image["id"] for image in images], files, categories, labels
    )


def rasterise(annotations: Sequence[dict[str, Any]], size: tuple[int, int], value: dict[int, int]) -> np.ndarray:
    """(H, W) uint8, 0 where nothing is: each annotation's pixels get `value[category_id]`, those of large areas first,
    so that small objects stay visible.
    """
    codec = _mask_codec()
    mask = np.zeros(size, dtype=np.uint8)
    for annotation in sorted(annotations, key=lambda a: -a["area"]):
        shape = annotation["segmentation"]
        if isinstance(shape, list):
            encoded = codec.merge(codec.frPyObjects(shape, *size))
        elif isinstance(shape["counts"], list):
            encoded = codec.frPyObjects(shape, *size)
        else:
            encoded = shape
        mask[codec.decode(encoded).astype(bool)] = value[annotation["category_id"]]
    return mask


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
