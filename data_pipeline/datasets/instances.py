"""COCO's instances files: where they lie, and what training needs of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cosa_fast.data_pipeline.datasets.labels import Labels
from cosa_fast.data_pipeline.datasets.shapes import shape_of
from cosa_fast.errors import UserError, counted, first_line, hint
from cosa_fast.files import nearest, read_json

# The two divisions of the same images that COCO has published; a folder has one or the other.
_OTHER_YEAR = {"train2014": "train2017", "val2014": "val2017", "train2017": "train2014", "val2017": "val2014"}


@dataclass(frozen=True)
class Instances:
    """What training needs of an instances file. ids, image_ids (COCO's numbers), files: one per image with at least one
    annotation. categories: number -> name, in ascending order of the numbers. labels: id -> names. shapes: whether any
    annotation has one. notes: what the user is to know of it.
    """

    path: Path
    ids: list[str]
    image_ids: list[int]
    files: list[str]
    categories: dict[int, str]
    labels: Labels
    shapes: bool
    notes: tuple[str, ...]


def find_instances(root: Path, split: str) -> tuple[Path, str]:
    """(instances file, the split that it is of): annotations/instances_SPLIT.json, or SPLIT.json, there, in the root or
    in an unpacked annotations folder; or SPLIT/_annotations.coco.json. For a split of 2014 that of 2017, and the other
    way round, where the folder has nothing of the year that is asked for. UserError if it is not there.
    """
    path = _path(root, split)
    if path is not None:
        return path, split
    known = splits(root)
    other = _OTHER_YEAR.get(split)
    if other and not any(name.endswith(split[-4:]) for name in known) and (path := _path(root, other)) is not None:
        return path, other
    near = hint(split, known) if root.exists() else nearest(root)
    raise UserError(
        f"{root / 'annotations' / f'instances_{split}.json'}: no such file{near}; unpack the COCO "
        f"annotations there (found splits: {', '.join(known) or 'none'}) or set data.root=... and data.train_split=..."
    )


def splits(root: Path) -> list[str]:
    """The splits that have an instances file, sorted."""
    files = {
        path.stem.removeprefix("instances_") for place in _folders(root) for path in place.glob("instances_*.json")
    }
    return sorted({*files, *(path.parent.name for path in root.glob("*/_annotations.coco.json"))})


def read_instances(path: Path) -> Instances:
    """Images with at least one annotation (crowds included) and the categories that they show. UserError if the file
    has another form, no such image, or two images of one name.
    """
    content = read_json(path)
    if isinstance(content, dict) and "images" in content and "annotations" not in content:
        raise UserError(f"{path}: holds no annotations, it only lists images; choose another split")
    try:
        categories = {c["id"]: _name(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
        annotations = by_image(content["annotations"])
        listed = content["images"]
        images = [image for image in listed if image["id"] in annotations]
        files = [_file(image) for image in images]
        ids = [PurePosixPath(file).with_suffix("").as_posix() for file in files]
        labels = {
            id: tuple({_category(a, categories): None for a in annotations[image["id"]]})
            for id, image in zip(ids, images, strict=True)
        }
        astray = len(annotations.keys() - {image["id"] for image in images})
        shapes = any(shape_of(a) is not None for each in annotations.values() for a in each)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: not a COCO instances file ({problem}); restore it") from None
    if len(set(categories.values())) < len(categories):
        raise UserError(f"{path}: two of its categories have one name; rename one of them")
    if not images:
        raise UserError(f"{path}: no image has an annotation; choose another split")
    if len(labels) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise UserError(f"{path}: two of its images have the name {twice}; rename one of them")
    notes = (
        f"{len(listed) - len(images)} of {len(listed)} images have no annotation and are left out",
        f"the annotations of {counted(astray, 'image')} that {path.name} does not list are left out",
    )
    said = tuple(note for note, count in zip(notes, (len(listed) - len(images), astray), strict=True) if count)
    return Instances(path, ids, [image["id"] for image in images], files, categories, labels, shapes, said)


def by_image(annotations: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Image number -> its annotations."""
    grouped: dict[int, list[dict[str, Any]]] = {}
    for annotation in annotations:
        grouped.setdefault(annotation["image_id"], []).append(annotation)
    return grouped


def image_sizes(content: dict[str, Any]) -> dict[int, tuple[Any, Any]]:
    """Image number -> (height, width), unchecked."""
    return {image["id"]: (image.get("height"), image.get("width")) for image in content["images"]}


def _folders(root: Path) -> list[Path]:
    return [root / "annotations", *sorted(root.glob("annotations*/annotations")), root]


def _path(root: Path, split: str) -> Path | None:
    names = (f"instances_{split}.json", f"{split}.json")
    places = [folder / name for folder in _folders(root) for name in names]
    return next((path for path in (*places, root / split / "_annotations.coco.json") if path.is_file()), None)


def _name(value: Any) -> str:
    """ValueError unless it is a text that can name something."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"{str(value)[:50]!r} is no name")
    return value


def _file(image: dict[str, Any]) -> str:
    """The image's path below the images' folder: file_name, or the last folder and the name of coco_url (LVIS)."""
    if "file_name" not in image and "coco_url" in image:
        return "/".join(_name(image["coco_url"]).split("/")[-2:])
    name = _name(image["file_name"]).replace("\\", "/").lstrip("/")
    return _name("/".join(part for part in name.split("/") if part != "."))


def _category(annotation: dict[str, Any], categories: dict[int, str]) -> str:
    number = annotation["category_id"]
    if number not in categories:
        raise ValueError(f"annotation {annotation.get('id')!r} is of category {number!r}, which it does not have")
    return categories[number]
