"""PASCAL VOC devkit layout: JPEGImages, ImageSets/Segmentation/SPLIT.txt, SegmentationClassAug or SegmentationClass,
Annotations.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from cosa_fast.data_pipeline.datasets.labels import Labels, class_names
from cosa_fast.data_pipeline.datasets.layout import Layout, file_names, mask_files
from cosa_fast.data_pipeline.datasets.packed import Pack
from cosa_fast.errors import UserError, hint
from cosa_fast.files import read_lines

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

LISTS = Path("ImageSets", "Segmentation")
ONEHOT_NAME = "cls_labels_onehot.npy"


def find_voc(root: Path, split: str, classes: Sequence[str] | None, pack: Pack | None) -> Layout:
    """Where the things of a split are in a devkit folder. UserError: no images, no such split, or an empty list."""
    if pack is None and not (root / "JPEGImages").is_dir():
        raise UserError(_missing_root(root))
    ids, images = read_split(root, split)
    augmented = root / "SegmentationClassAug"
    return Layout(
        ids=ids,
        images=images,
        listing=root / LISTS / f"{split}.txt",
        classes=class_names(root, classes, CLASSES),
        label_files=(root / "labels.json", root / LISTS / ONEHOT_NAME, root / ONEHOT_NAME),
        annotations=(root / "Annotations", lambda: read_annotations(root, ids)),
        everything=None if pack else frozenset(Path(name).stem for name in file_names(root / "JPEGImages")),
        masks=mask_files(augmented if augmented.is_dir() else root / "SegmentationClass", ids),
    )


def read_split(root: Path, split: str) -> tuple[list[str], list[Path]]:
    """Ids and image files of ImageSets/Segmentation/SPLIT.txt, whose lines are "ID" or
    "/JPEGImages/ID.jpg /SegmentationClass/ID.png". UserError: no such file, or nothing in it.
    """
    path = root / LISTS / f"{split}.txt"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.txt"))
        choice = f"there are: {', '.join(known) or 'none'}{_train_aug_advice(split)}"
        raise UserError(f"{path}: no such split{hint(split, known)}; {choice}")
    first_words = [line.split()[0] for line in read_lines(path)]
    if not first_words:
        raise UserError(f"{path}: the list is empty; put one image id on each line")
    ids = [PurePosixPath(word).stem if "/" in word else word for word in first_words]
    images = [root / (word.lstrip("/") if "/" in word else f"JPEGImages/{word}.jpg") for word in first_words]
    return ids, images


def read_annotations(root: Path, ids: Sequence[str]) -> Labels:
    """Class names per image from Annotations/ID.xml, those of "difficult" objects included. An image without such a
    file is left out; UserError for a damaged one.
    """
    labels: Labels = {}
    for id in ids:
        path = root / "Annotations" / f"{id}.xml"
        if not path.is_file():
            continue
        try:
            objects = ElementTree.parse(path).getroot().findall("object")
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            raise UserError(f"{path}: not a readable VOC annotation ({error}); restore the file") from None
        labels[id] = tuple(dict.fromkeys((item.findtext("name") or "").strip() for item in objects))
    return labels


def _train_aug_advice(split: str) -> str:
    return " (train_aug.txt comes with the SBD lists, beside SegmentationClassAug.zip)" if split == "train_aug" else ""


def _missing_root(root: Path) -> str:
    return (
        f"{root / 'JPEGImages'}: no PASCAL VOC images there; unpack VOCtrainval_11-May-2012.tar and, for train_aug, "
        "SegmentationClassAug.zip (train_aug.txt comes with the SBD lists) "
        "and give the VOC2012 folder with data.root=..., or try: python -m cosa_fast.train demo.yaml"
    )
