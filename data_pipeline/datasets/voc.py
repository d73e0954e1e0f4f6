"""PASCAL VOC devkit layout: JPEGImages, ImageSets/Segmentation/SPLIT.txt, SegmentationClassAug or SegmentationClass,
Annotations; or a folder above it.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES
from cosa_fast.data_pipeline.datasets.labels import Labels, class_names, spelt_as
from cosa_fast.data_pipeline.datasets.layout import Layout, file_names
from cosa_fast.data_pipeline.datasets.masks import MaskFiles, find_masks
from cosa_fast.data_pipeline.datasets.packed import Pack
from cosa_fast.errors import UserError, counted, hint
from cosa_fast.files import nearest, read_lines, write_text

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
IMAGES = "JPEGImages"
MASKS = ("SegmentationClassAug", "SegmentationClass")
# Images with masks of VOC2012 and SBD together, less those of VOC2012 val.
TRAIN_AUG = 10_582

_YEARS = ("VOC2012", "VOC2011", "VOC2010", "VOC2009", "VOC2008", "VOC2007")
_PRESENT, _DIFFICULT, _ABSENT = "1", "0", "-1"


@dataclass(frozen=True)
class Listed:
    """A row of a list: the image's id, its path below the root, and that of a mask where the list names one."""

    id: str
    image: str
    mask: str | None = None


def find_voc(root: Path, split: str, classes: Sequence[str] | None, pack: Pack | None) -> Layout:
    """Where the things of a split are in a devkit folder. UserError: no images, no such split, or an empty list."""
    given, root = root, devkit(root)
    if pack is None and not (root / IMAGES).is_dir():
        raise UserError(_missing_root(root))
    rows, note = read_split(root, split)
    notes = [*([f"{root} below {given} is taken"] if root != given else []), *([note] if note else [])]
    ids = [row.id for row in rows]
    names = class_names(root, classes, CLASSES)
    everything = frozenset(_stem(name) for name in file_names(root / IMAGES))
    return Layout(
        ids=ids,
        images=[root / row.image for row in rows],
        listing=list_file(root, split),
        classes=names,
        label_files=(root / "labels.json", root / LISTS / ONEHOT_NAME, root / ONEHOT_NAME),
        annotations=(root / "Annotations", lambda some: read_annotations(root, some, names)),
        everything=None if pack else everything,
        masks=_masks(root, rows, everything),
        notes=tuple(notes),
    )


def devkit(root: Path) -> Path:
    """The folder with JPEGImages (or, of a set whose images are packed, ImageSets): `root` itself, or VOC2012 (else
    another year, if there is only one) in it or in its VOCdevkit; `root` if there is none. UserError for several years.
    """
    for part in (IMAGES, "ImageSets"):
        if (root / part).is_dir():
            return root
        for above in (root, root / "VOCdevkit"):
            found = [year for year in _YEARS if (above / year / part).is_dir()]
            if len(found) > 1 and found[0] != _YEARS[0]:
                raise UserError(
                    f"{above}: holds {', '.join(found)}; name one of them with data.root={above / found[0]}"
                )
            if found:
                return above / found[0]
    return root


def list_file(root: Path, split: str) -> Path:
    """The list of a split: of segmentation, else of ImageSets/Main, else ImageSets/SPLIT.txt ("Main/cat_train"); where
    none is there, the first.
    """
    files = [place / f"{split}.txt" for place in _places(root)]
    return next((file for file in files if file.is_file()), files[0])


def splits(root: Path) -> list[str]:
    """The lists of segmentation; where there are none, those of the other places."""
    for place in _places(root):
        if names := sorted(path.stem for path in place.glob("*.txt")):
            return names
    return []


def _places(root: Path) -> list[Path]:
    return [root / LISTS, root / "ImageSets" / "SegmentationAug", root / "ImageSets" / "Main", root / "ImageSets"]


def read_split(root: Path, split: str) -> tuple[list[Listed], str]:
    """(rows of the split's list, what is to be known of them). A line is an id or a path, with or without suffix, and
    after it nothing, the path of a mask, or -1, 0 or 1 as in the class lists of ImageSets/Main, whose images are those
    with 1, or 0 for objects that are difficult to see.

    UserError: no such file, nothing in it, another second column, or an id with several images.
    """
    path = list_file(root, split)
    if not path.is_file():
        raise UserError(_missing_list(root, path, split))
    images = _Images(root, path)
    lines = [images.columns(line) for line in read_lines(path)]
    if not lines:
        raise UserError(f"{path}: the list is empty; put one image id on each line")
    marks = {line[1] for line in lines if len(line) == 2}
    members, note = lines, ""
    if marks and marks <= {_PRESENT, _DIFFICULT, _ABSENT}:
        members = [line for line in lines if len(line) < 2 or line[1] != _ABSENT]
        note = (
            f"{len(members)} of {len(lines)} images of {path.name}: those with 1 or 0 (difficult) in its second column"
        )
        if not members:
            raise UserError(f"{path}: every image has -1, absent, in the second column; choose another list")
    return [images.row(line) for line in members], note


def build_train_aug(root: Path, count: int | None = None) -> Path:
    """Write ImageSets/Segmentation/train_aug.txt: the masks of SegmentationClassAug less the images of val.txt, by
    name. count: how many there must be; None means TRAIN_AUG. UserError: a list that is there, no masks, no val.txt, or
    another number of images.
    """
    path, masks, val = root / LISTS / "train_aug.txt", root / MASKS[0], root / LISTS / "val.txt"
    wanted = TRAIN_AUG if count is None else count
    if path.is_file():
        raise UserError(f"{path}: is there already; remove it to have it built anew")
    if not masks.is_dir():
        raise UserError(
            f"{masks}: no such folder; unpack SegmentationClassAug.zip there, or get the masks with: "
            f"python -m cosa_fast.prepare sbd --download --root {root}"
        )
    held = {row.id for row in read_split(root, "val")[0]}
    ids = sorted({_stem(name) for name in file_names(masks) if name.lower().endswith(".png")} - held)
    if len(ids) != wanted:
        raise UserError(
            f"{masks}: {counted(len(ids), 'mask')} besides those of {val.name}, but train_aug has {wanted} images; "
            "restore the masks, or the list"
        )
    write_text(path, "\n".join(ids) + "\n")
    return path


def read_annotations(root: Path, ids: Sequence[str], classes: Sequence[str] = ()) -> Labels:
    """Class names per image from Annotations/ID.xml, in the spelling of `classes`: of every object, those marked
    "difficult" included, at whatever depth and in whatever namespace. An image without such a file is left out;
    UserError for a damaged one, and for an object without a name.
    """
    labels: Labels = {}
    spelling = spelt_as(classes)
    for id in ids:
        path = root / "Annotations" / f"{id}.xml"
        if not path.is_file():
            continue
        try:
            tree = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            raise UserError(f"{path}: not a readable VOC annotation ({error}); restore the file") from None
        names = [_object_name(item) for item in tree.iter() if _tag(item) == "object"]
        if not all(names):
            raise UserError(f"{path}: an object without a name; write it or remove the object")
        labels[id] = tuple(dict.fromkeys(map(spelling, names)))
    return labels


class _Images:
    """Finds the images of a list, whatever their suffix; the folder is listed once."""

    def __init__(self, root: Path, listing: Path) -> None:
        self._listing = listing
        self._names = file_names(root / IMAGES)
        self._by_stem: dict[str, list[str]] = {}
        for name in sorted(self._names):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                self._by_stem.setdefault(_stem(name), []).append(name)

    def columns(self, line: str) -> list[str]:
        """The cells of a line; an image's name with blanks in it is one."""
        line = line.replace("\\", "/")
        whole = line in self._names or line in self._by_stem
        words = [] if whole else [word for word in re.split(r"[\s,;]+", line) if word]
        return words or [line]

    def row(self, columns: Sequence[str]) -> Listed:
        word, *others = columns
        if len(others) == 1 and others[0] in (_PRESENT, _DIFFICULT, _ABSENT):
            others = []
        if len(others) > 1 or (others and Path(others[0]).suffix.lower() not in IMAGE_SUFFIXES):
            raise UserError(
                f"{self._listing}: {' '.join(columns)[:80]!r} is neither an image, nor an image and its mask, nor an "
                "image and -1, 0 or 1; correct the line"
            )
        folder, path = _below(word)
        if folder != IMAGES:
            return Listed(PurePosixPath(path).stem, f"{folder}/{path}", *others)
        id = _stem(path)
        return Listed(id, f"{IMAGES}/{path if path in self._names else self._named(id)}", *others)

    def _named(self, id: str) -> str:
        found = self._by_stem.get(id, [f"{id}.jpg"])
        if len(found) > 1 and f"{id}.jpg" not in found:
            raise UserError(
                f"{self._listing}: {id} may be {' or '.join(found)}; write the suffix, or remove one of them"
            )
        return f"{id}.jpg" if f"{id}.jpg" in found else found[0]


def _below(word: str) -> tuple[str, str]:
    """(folder below the root, path in it) of an image as a list names it."""
    parts = PurePosixPath(word).parts or (word,)
    if IMAGES in parts:
        return IMAGES, "/".join(parts[parts.index(IMAGES) + 1 :])
    folders = [part for part in parts[:-1] if part not in ("/", ".")]
    return "/".join(folders) or IMAGES, parts[-1]


def _stem(name: str) -> str:
    """The name without the suffix of an image; other dots stay."""
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in IMAGE_SUFFIXES else name


def _masks(root: Path, rows: Sequence[Listed], everything: Collection[str]) -> MaskFiles:
    """The masks that the list names, where they are; else those named after the images."""
    found = find_masks([root / folder for folder in MASKS], [row.id for row in rows], others=everything)
    named = {row.id: root / row.mask.lstrip("/") for row in rows if row.mask}
    there = {folder: file_names(folder) for folder in {mask.parent for mask in named.values()}}
    named = {id: mask for id, mask in named.items() if mask.name in there[mask.parent]}
    if not named:
        return found
    usual = found.files or [root / MASKS[0] / f"{row.id}.png" for row in rows]
    return MaskFiles([named.get(row.id, file) for row, file in zip(rows, usual, strict=True)])


def _tag(item: ElementTree.Element) -> str:
    """The element's name without its namespace."""
    return item.tag.rpartition("}")[2] if isinstance(item.tag, str) else ""


def _object_name(item: ElementTree.Element) -> str:
    return next(((part.text or "").strip() for part in item if _tag(part) == "name"), "")


def _missing_list(root: Path, path: Path, split: str) -> str:
    known = sorted(p.stem for p in path.parent.glob("*.txt"))
    advice = ""
    if split == "train_aug" and (root / MASKS[0]).is_dir():
        command = f"python -m cosa_fast.prepare --format voc --root {root} --split train_aug --make-list"
        advice = f"; build it from {MASKS[0]} less val with: {command}"
    elif split == "train_aug":
        advice = " (train_aug.txt comes with the SBD lists, beside SegmentationClassAug.zip)"
    return f"{path}: no such split{hint(split, known)}; there are: {', '.join(known) or 'none'}{advice}"


def _missing_root(root: Path) -> str:
    near = "" if root.exists() else nearest(root)
    return (
        f"{root / IMAGES}: no PASCAL VOC images there{near}; unpack VOCtrainval_11-May-2012.tar and, for train_aug, "
        "SegmentationClassAug.zip (train_aug.txt comes with the SBD lists), or run: python -m cosa_fast.prepare voc "
        "--download; give the VOC2012 folder with data.root=..., or try: python -m cosa_fast.train demo.yaml"
    )
