"""PASCAL VOC devkit layout: JPEGImages, ImageSets/Segmentation/SPLIT.txt, SegmentationClassAug or SegmentationClass,
Annotations.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import Labels, class_names, encode_labels, read_labels, require_labels
from cosa_fast.data_pipeline.datasets.packed import Pack
from cosa_fast.errors import UserError, hint
from cosa_fast.files import file_names, read_lines, require_files

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


def open_voc(
    root: Path,
    split: str,
    *,
    labels: Path | None,
    classes: Sequence[str] | None,
    need_labels: bool,
    pack: Pack | None,
) -> ImageDataset:
    """Open one split of a devkit folder. UserErrors as described at `datasets.open_dataset`."""
    if pack is None and not (root / "JPEGImages").is_dir():
        raise UserError(_missing_root(root))
    ids, images = read_split(root, split)
    if pack is None:
        require_files(images, root / LISTS / f"{split}.txt")
    names = class_names(root, classes, CLASSES)
    table = None
    found = find_labels(root, ids, names, labels)
    if found is not None:
        source, content = found
        table = encode_labels(content, ids, names, source)
    if need_labels:
        if table is None:
            raise UserError(_missing_labels(root, split))
        require_labels(table, ids, source)
    return ImageDataset(names, ids, images, table, mask_paths(root, ids))


def read_split(root: Path, split: str) -> tuple[list[str], list[Path]]:
    """Ids and image files of ImageSets/Segmentation/SPLIT.txt, whose lines are "id" or "/JPEGImages/x.jpg
    /Segmentation.../x.png".
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


def mask_folder(root: Path) -> Path | None:
    """SegmentationClassAug if present, else SegmentationClass, else None."""
    folders = (root / "SegmentationClassAug", root / "SegmentationClass")
    return next((folder for folder in folders if folder.is_dir()), None)


def mask_paths(root: Path, ids: Sequence[str]) -> list[Path] | None:
    """The mask file of every image, or None if not one of them exists. No mask is opened."""
    folder = mask_folder(root)
    if folder is None:
        return None
    present = file_names(folder)
    return [folder / f"{id}.png" for id in ids] if any(f"{id}.png" in present for id in ids) else None


def find_labels(
    root: Path, ids: Sequence[str], classes: Sequence[str], given: Path | None
) -> tuple[str, Labels] | None:
    """(source, labels) from the given file, else ROOT/labels.json, the one-hot file, or Annotations; None if there is
    nothing.
    """
    candidates = (root / "labels.json", root / LISTS / ONEHOT_NAME, root / ONEHOT_NAME)
    path = given or next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is not None:
        return str(path), read_labels(path, classes)
    if (root / "Annotations").is_dir():
        return str(root / "Annotations"), read_annotations(root, ids)
    return None


def read_annotations(root: Path, ids: Sequence[str]) -> Labels:
    """Class names per image from Annotations/ID.xml, "difficult" objects included. Images without a file are left out;
    UserError for a damaged one.
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


def _missing_labels(root: Path, split: str) -> str:
    looked = f"{root}/labels.json, {root / LISTS / ONEHOT_NAME}, {root / ONEHOT_NAME}, {root}/Annotations"
    command = f"python -m cosa_fast.prepare --format voc --root {root} --split {split}"
    return f"no image labels: looked for {looked}; give data.labels=FILE or build one with: {command}"
