"""Image-level labels, the only supervision: reading label files, and turning names into a multi-hot table.

A label file is JSON, {"image id": ["class", ...], ...}; or CSV with one row per image: id, then class names in further
columns or separated by ";" (several rows of one id are joined; a first row that starts with "id" or "image" is a
heading); or the field's cls_labels_onehot.npy. An id without a class has the label "none of the classes"; an id that is
not there has no label.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES
from cosa_fast.data_pipeline.datasets.onehot_npy import read_onehot
from cosa_fast.errors import UserError, hint
from cosa_fast.files import read_json, read_lines, read_text, write_text

Labels = dict[str, tuple[str, ...]]

_CSV_HEADINGS = ("id", "image", "image_id", "filename")


@dataclass(frozen=True)
class LabelTable:
    """present: (N, C) uint8 multi-hot. labelled: (N,) bool; False where an image has no label, and its row is 0."""

    present: np.ndarray
    labelled: np.ndarray


def read_labels(path: Path, classes: Sequence[str] | None) -> Labels:
    """Image id -> class names from a .json, .csv or .npy label file. The names in JSON and CSV are not checked here.

    `classes` names the columns of an .npy file. UserError naming the file: unreadable, of another form, or an .npy
    without classes.
    """
    match path.suffix.lower():
        case ".json":
            labels = _from_json(path)
        case ".csv":
            labels = _from_csv(path)
        case ".npy":
            labels = _from_npy(path, classes)
        case suffix:
            raise UserError(
                f"{path}: a label file ends in .json, .csv or .npy, not {suffix or 'nothing'!r}; rename or convert it"
            )
    return {_without_suffix(id): names for id, names in labels.items()}


def write_labels(path: Path, labels: Mapping[str, Iterable[str]]) -> None:
    """Write a JSON label file, one image per line, atomically. UserError if `path` does not end in .json or cannot be
    written.
    """
    if path.suffix.lower() != ".json":
        raise UserError(f"{path}: label files are written as JSON; choose a name that ends in .json")
    rows = (f"  {json.dumps(id)}: {json.dumps(list(names), ensure_ascii=False)}" for id, names in labels.items())
    write_text(path, "{\n" + ",\n".join(rows) + "\n}\n")


def class_names(root: Path, given: Sequence[str] | None, fallback: Sequence[str]) -> tuple[str, ...]:
    """The given foreground names, else the lines of ROOT/classes.txt, else `fallback`. UserError if there are none or
    one comes twice.
    """
    path = root / "classes.txt"
    source = "data.classes" if given else str(path)
    names = tuple(given or (read_lines(path) if path.is_file() else fallback))
    if not names:
        raise UserError(f"{path}: no class names; write them there, one a line, or set data.classes=[...]")
    if len(set(names)) != len(names):
        raise UserError(f"{source}: a class is named twice; remove the duplicate")
    return names


def encode_labels(
    labels: Mapping[str, Sequence[str]], ids: Sequence[str], classes: Sequence[str], source: str
) -> LabelTable:
    """The multi-hot table of `ids`. UserError naming `source` and the image for a name that is not among `classes`."""
    column = {name: index for index, name in enumerate(classes)}
    present = np.zeros((len(ids), len(classes)), dtype=np.uint8)
    labelled = np.zeros(len(ids), dtype=bool)
    for row, id in enumerate(ids):
        names = labels.get(id)
        labelled[row] = names is not None
        for name in names or ():
            if name not in column:
                raise UserError(
                    f"{source}: image {id} has the unknown class {name!r}{hint(name, classes)}; "
                    "correct it or give the list of classes"
                )
            present[row, column[name]] = 1
    return LabelTable(present, labelled)


def require_labels(table: LabelTable, ids: Sequence[str], source: str) -> None:
    """UserError if any image has no label."""
    missing = np.flatnonzero(~table.labelled)
    if missing.size:
        raise UserError(
            f"{source}: no label for {missing.size} of {len(ids)} images, first {ids[missing[0]]}; "
            "add them (an empty list means: none of the classes) or build the file with: python -m cosa_fast.prepare"
        )


def _from_json(path: Path) -> Labels:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f'{path}: wanted {{"image id": ["class", ...], ...}}, got a JSON {type(content).__name__}; '
            "delete it and rebuild it with: python -m cosa_fast.prepare"
        )
    labels = {}
    for id, names in content.items():
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}: the entry of image {id} is not a list of class names; correct it")
        labels[id] = tuple(names)
    return labels


def _from_csv(path: Path) -> Labels:
    labels: Labels = {}
    try:
        rows = list(csv.reader(read_text(path).splitlines(), skipinitialspace=True))
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV ({error}); mend the file") from None
    for number, row in enumerate(rows):
        id = row[0].strip() if row else ""
        if not id or (number == 0 and id.lower() in _CSV_HEADINGS):
            continue
        names = (name.strip() for cell in row[1:] for name in cell.split(";"))
        labels[id] = tuple(dict.fromkeys((*labels.get(id, ()), *(name for name in names if name))))
    return labels


def _from_npy(path: Path, classes: Sequence[str] | None) -> Labels:
    if classes is None:
        raise UserError(
            f"{path}: a one-hot file holds no class names; give data.classes or put a classes.txt beside the images"
        )
    rows = read_onehot(path, len(classes))
    return {id: tuple(name for name, present in zip(classes, row, strict=True) if present) for id, row in rows.items()}


def _without_suffix(id: str) -> str:
    stem, dot, suffix = id.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else id
