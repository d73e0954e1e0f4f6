"""Image-level labels, the only supervision: reading label files, and turning names into a multi-hot table.

A label file is JSON, {"image": ["class", ...], ...} or a list of records; a table (.csv, .tsv, see `tables.py`); or the
field's cls_labels_onehot.npy. docs/data.md lists every form. "None of the classes" is something that a file says: [] or
the word none; an empty cell is no label.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES
from cosa_fast.data_pipeline.datasets.onehot_npy import read_onehot
from cosa_fast.data_pipeline.datasets.tables import Entry, read_rows, read_table, split_names
from cosa_fast.errors import UserError, counted, hint
from cosa_fast.files import read_lines, read_text, write_text

Labels = dict[str, tuple[str, ...]]
Say = Callable[[str], None]
# In the root, in the order in which they count.
LABEL_FILES = ("labels.json", "labels.csv", "labels.tsv")
_SHOWN_CLASSES = 8


class FileLabels(Labels):
    """The labels of a file. lines: where in it, "line 3", an (image, class) was read first."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class LabelTable:
    """present: (N, C) uint8 multi-hot. labelled: (N,) bool; False where an image has no label, and its row is 0."""

    present: np.ndarray
    labelled: np.ndarray


class ImageNames:
    """Finds the image that a label file means: by its id, with more or fewer folders, suffix or none, in any case.

    ids: of the images that are known. aliases: other paths of theirs, without suffix, with their ids. complete: whether
    there are no other images, so that any other name is a slip.
    """

    def __init__(
        self, ids: Collection[str] = (), aliases: Mapping[str, str] = MappingProxyType({}), *, complete: bool = False
    ) -> None:
        self.complete = complete and bool(ids)
        self._ids = set(ids)
        self._exact = {**aliases, **{id: id for id in ids}}
        self._numbers: dict[tuple[str, int], list[str]] | None = None
        self._short: dict[str, set[str]] = {}
        for name, id in self._exact.items():
            for form in {name.lower(), id.rpartition("/")[2].lower()}:
                self._short.setdefault(form, set()).add(id)

    def find(self, name: str) -> str | None:
        """The id, or None. UserError where several images have that name, in other folders or another case."""
        plain = _without_suffix(name.strip().replace("\\", "/").removeprefix("./"))
        parts = plain.split("/")
        for form in ("/".join(parts[start:]) for start in range(len(parts))):
            if form in self._exact and (form == plain or "/" in form):
                return self._exact[form]
            found = self._short.get(form.lower(), set())
            if len(found) > 1 and "/" not in form:
                exact = [id for id in found if id.rpartition("/")[2] == form]
                if len(exact) != 1:
                    raise UserError(f"{name!r} may be {' or '.join(sorted(found)[:2])}; write the folder too")
                return exact[0]
            if found:
                return next(iter(found))
        return None

    def __call__(self, name: str) -> bool:
        try:
            return self.find(name) is not None
        except UserError:
            return True

    def id(self, name: str) -> str:
        """The id that is meant; where it is not known, the name itself without suffix."""
        return self.find(name) or _without_suffix(name.strip().replace("\\", "/").removeprefix("./"))

    def numbered(self, number: int) -> str:
        """The id whose digits make up the number (2007_000032 for 2007000032), else the one that ends with it
        (COCO_val2014_000000000042 for 42); else the number as text. UserError where several end with it.
        """
        if self._numbers is None:
            self._numbers = {}
            for id in self._ids:
                digits = re.findall(r"\d+", id.rpartition("/")[2])
                for part, form in (("whole", "".join(digits)), ("end", digits[-1] if digits else "")):
                    if form and len(form) < 19:
                        self._numbers.setdefault((part, int(form)), []).append(id)
        found = self._numbers.get(("whole", number)) or self._numbers.get(("end", number)) or [str(number)]
        if len(found) > 1:
            raise UserError(f"the number {number} may be {' or '.join(sorted(found)[:2])}; write names for numbers")
        return found[0]

    def nearest(self, name: str) -> str:
        return hint(_without_suffix(name), self._ids) if len(self._ids) < 20_000 else ""


def read_labels(
    path: Path, classes: Sequence[str] | None, images: ImageNames | None = None, say: Say | None = None
) -> Labels:
    """Image id -> class names from a .json, .csv, .tsv or .npy label file; images whose cell is empty are left out.

    `classes` corrects upper and lower case, blanks, "-" and "_" in the names, and names the columns of an .npy file; a
    name that is not among them is left to `encode_labels`. images: those that there are. say: is told how the file was
    understood. UserError naming the file and line: unreadable, of another form, numbers for names, or .npy without
    classes.
    """
    images, say = images or ImageNames(), say or (lambda text: None)
    match path.suffix.lower():
        case ".json":
            entries, form = _from_json(path, images)
        case ".csv" | ".tsv":
            entries, form = read_table(path, images if images.complete else None)
        case ".npy":
            return _from_npy(path, classes, images)
        case suffix:
            raise UserError(
                f"{path}: a label file ends in .json, .csv, .tsv or .npy, not {suffix or 'nothing'!r}; "
                "rename it, or save it as CSV"
            )
    say(f"{path.name}: {form}")
    spelling = _Spelling(path, entries, classes)
    labels = _gather(path, entries, spelling, images, say)
    for note in spelling.notes():
        say(f"{path.name}: {note}")
    return labels


def write_labels(path: Path, labels: Mapping[str, Iterable[str]]) -> None:
    """Write a JSON label file, one image per line, atomically. UserError if `path` does not end in .json or cannot be
    written.
    """
    if path.suffix.lower() != ".json":
        raise UserError(f"{path}: label files are written as JSON; choose a name that ends in .json")
    rows = (f"  {json.dumps(id)}: {json.dumps(list(names), ensure_ascii=False)}" for id, names in labels.items())
    write_text(path, "{\n" + ",\n".join(rows) + "\n}\n")


def class_names(root: Path, given: Sequence[str] | None, fallback: Sequence[str]) -> tuple[str, ...]:
    """The given foreground names, else the lines of ROOT/classes.txt, else `fallback`. UserError if there are none, or
    two that differ at most in case, blanks, "-" and "_".
    """
    path = root / "classes.txt"
    source = "data.classes" if given else str(path)
    names = tuple(given or (read_lines(path) if path.is_file() else fallback))
    if not names:
        raise UserError(
            f"{path}: no class names; give the images labels ({root / 'labels.csv'}: image,classes), write the names "
            "there, one a line, or set data.classes=[...]"
        )
    keys = Counter(map(_key, names))
    twice = [name for name in names if keys[_key(name)] > 1]
    if twice:
        raise UserError(f"{source}: a class is named twice ({', '.join(twice)}); remove the duplicate")
    return names


def spelt_as(classes: Sequence[str]) -> Callable[[str], str]:
    """A function that gives a name the spelling that it has in `classes`; a name that is none of them stays."""
    chosen = {_key(name): name for name in classes}
    return lambda name: chosen.get(_key(name), name)


def encode_labels(
    labels: Mapping[str, Sequence[str]], ids: Sequence[str], classes: Sequence[str], source: str
) -> LabelTable:
    """The multi-hot table of `ids`. UserError for a name that is not among `classes`, with `source`, the line in it
    where `labels` are a file's, and the image."""
    column = {name: index for index, name in enumerate(classes)}
    present = np.zeros((len(ids), len(classes)), dtype=np.uint8)
    labelled = np.zeros(len(ids), dtype=bool)
    for row, id in enumerate(ids):
        names = labels.get(id)
        labelled[row] = names is not None
        for name in names or ():
            if name not in column:
                line = labels.lines.get((id, name)) if isinstance(labels, FileLabels) else None
                known = hint(name, classes) or f", none of {_some(classes)}"
                raise UserError(
                    f"{source}{', ' * (line is not None)}{line or ''}: image {id} has the unknown class "
                    f"{name!r}{known}; correct it, or add it to classes.txt (data.classes, where that is set)"
                )
            present[row, column[name]] = 1
    return LabelTable(present, labelled)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN_CLASSES]) + ", ..." * (len(names) > _SHOWN_CLASSES)


def require_labels(table: LabelTable, ids: Sequence[str], source: str, *notes: str) -> None:
    """UserError, with `notes` at its end, if any image has no label."""
    missing = np.flatnonzero(~table.labelled)
    if missing.size:
        remedy = (
            "add them ([] in JSON and the word none in a table mean: none of the classes), take the images off the "
            "list, or build the file with: python -m cosa_fast.prepare"
        )
        what = f"no label for {missing.size} of {len(ids)} images, first {ids[missing[0]]}"
        raise UserError(f"{source}: {'; '.join((what, remedy, *notes))}")


def describe_classes(table: LabelTable, classes: Sequence[str], limit: int = 12) -> str:
    """ "cat 20, dog 18, ...; 3 images with none of them"."""
    counts = table.present.sum(0).tolist()
    shown = [f"{name} {count}" for name, count in zip(classes, counts, strict=True) if count][:limit]
    more = sum(count > 0 for count in counts) - len(shown)
    absent = sum(count == 0 for count in counts)
    empty = int((table.labelled & (table.present.sum(1) == 0)).sum())
    text = ", ".join(shown) + (f", and {more} more" if more else "")
    text += f"; {counted(absent, 'class', 'es')} on no image" if absent else ""
    return text + (f"; {counted(empty, 'image')} with none of the classes" if empty else "")


class _Spelling:
    """One spelling for each class: that of `classes`, else the most frequent one."""

    def __init__(self, path: Path, entries: Sequence[Entry], classes: Sequence[str] | None) -> None:
        self._classes = tuple(classes or ())
        self._seen = Counter(name for entry in entries for name in entry.names or ())
        self._chosen = {_key(name): name for name in self._classes}
        for name, _ in self._seen.most_common():
            self._chosen.setdefault(_key(name), name)
        known = set(self._chosen)
        for entry in entries:
            for name in entry.names or ():
                self._check(path, entry.line, name, known)

    def __getitem__(self, name: str) -> str:
        return self._chosen[_key(name)]

    def notes(self) -> list[str]:
        """Which spellings were taken for one class, and which of those that stay look like one."""
        merged = [
            f"{name!r} ({count}) is taken for {self[name]!r}"
            for name, count in self._seen.items()
            if self[name] != name
        ]
        return ([f"spellings: {', '.join(merged[:6])}"] if merged else []) + self._alike()

    def _alike(self) -> list[str]:
        if self._classes:
            return []
        counts: Counter[str] = Counter()
        for name, count in self._seen.items():
            counts[self[name]] += count
        notes = []
        for name, count in counts.items():
            others = [other for other in counts if other != name and counts[other] >= 5 * count]
            near = get_close_matches(name.lower(), [other.lower() for other in others], n=1, cutoff=0.8)
            if near and count <= 3:
                notes.append(
                    f"warning: the class {name!r} ({counted(count, 'image')}) looks like {near[0]!r}; correct it if "
                    "it is a slip, or name all classes in classes.txt"
                )
        return notes

    def _check(self, path: Path, line: str, name: str, known: set[str]) -> None:
        if self._classes and _key(name) in {_key(each) for each in self._classes}:
            return
        if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", name.lower()):
            raise UserError(
                f"{path}, {line}: {name!r} is a number, not a class; write names, or a heading with the classes' names "
                "over columns of 0 and 1"
            )
        words = name.split()
        if len(words) > 1 and all(_key(word) in known for word in words):
            raise UserError(f"{path}, {line}: is {name!r} one class or {len(words)}? separate classes with ';'")


def _gather(path: Path, entries: Sequence[Entry], spelling: _Spelling, images: ImageNames, say: Say) -> Labels:
    labels = FileLabels()
    rows: Counter[str] = Counter()
    absent: list[str] = []
    empty = 0
    for entry in entries:
        try:
            id = images.id(entry.image)
        except UserError as error:
            raise UserError(f"{path}, {entry.line}: {error}") from None
        if images.complete and not images(entry.image):
            absent.append(entry.image)
        if entry.names is None:
            empty += 1
            continue
        rows[id] += 1
        if id in labels and bool(labels[id]) != bool(entry.names):
            raise UserError(
                f"{path}, {entry.line}: image {entry.image} has classes in one row and none of them in another; "
                "correct it"
            )
        names = [spelling[name] for name in entry.names]
        labels[id] = tuple(dict.fromkeys((*labels.get(id, ()), *names)))
        for name in names:
            labels.lines.setdefault((id, name), entry.line)
    if absent and len(absent) == len(entries):
        raise UserError(
            f"{path}: none of its images is there, first {absent[0]!r}{images.nearest(absent[0])}; correct the names"
        )
    if absent:
        say(
            f"{path.name}: warning: {len(absent)} of {len(entries)} rows are of images that are not there, first "
            f"{absent[0]!r}{images.nearest(absent[0])}"
        )
    if empty:
        say(f"{path.name}: {counted(empty, 'row')} without a class; write none where that is meant")
    several = sum(count > 1 for count in rows.values())
    if several:
        say(f"{path.name}: {counted(several, 'image')} with several rows, whose classes are joined")
    return labels


def _from_json(path: Path, images: ImageNames) -> tuple[list[Entry], str]:
    try:
        content = json.loads(read_text(path), object_pairs_hook=_no_twins)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); mend the file") from None
    except _TwinError as error:
        raise UserError(f"{path}: {error.args[0]!r} is there twice; merge the two entries") from None
    if isinstance(content, list) and content and all(isinstance(item, dict) for item in content):
        return _from_records(path, content, images)
    if not isinstance(content, dict):
        raise UserError(
            f'{path}: wanted {{"image": ["class", ...], ...}} or a list of records, got a JSON '
            f"{type(content).__name__}; write it so, or delete it and build one with: python -m cosa_fast.prepare"
        )
    entries, seen = [], dict[str, str]()
    for name, value in content.items():
        line = f"the entry of image {name}"
        id = _without_suffix(name)
        if id in seen:
            raise UserError(f"{path}: {seen[id]!r} and {name!r} are one image; merge the two entries")
        seen[id] = name
        entries.append(Entry(line, name, _json_names(path, line, value)))
    return entries, "JSON, image to classes"


def _from_records(path: Path, records: list[dict[str, Any]], images: ImageNames) -> tuple[list[Entry], str]:
    keys = list(dict.fromkeys(key for record in records for key in record))

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            raise UserError(f"{path}: a record holds an object; write the classes as a list of names")
        return "" if value is None else str(value)

    rows = [keys, *([cell(record.get(key)) for key in keys] for record in records)]
    where = ["heading", *(f"record {number}" for number in range(1, len(rows)))]
    entries, form = read_rows(path, where, rows, images if images.complete else None)
    return entries, f"JSON records, {form}"


def _json_names(path: Path, line: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return split_names(value)
    if isinstance(value, dict) and value and all(mark in (0, 1) for mark in value.values()):
        return tuple(" ".join(name.split()) for name, mark in value.items() if mark)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: {line} is not a list of class names; correct it")
    names = tuple(dict.fromkeys(" ".join(name.split()) for name in value))
    if any(split_names(name) in (None, ()) for name in names):
        raise UserError(f"{path}: {line} holds an empty name; remove it ([] means: none of the classes)")
    return names


class _TwinError(Exception):
    pass


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwinError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _from_npy(path: Path, classes: Sequence[str] | None, images: ImageNames) -> Labels:
    if classes is None:
        raise UserError(
            f"{path}: a one-hot file holds no class names; give data.classes or put a classes.txt beside the images"
        )
    labels: Labels = {}
    for key, row in read_onehot(path, len(classes)).items():
        try:
            id = images.numbered(key) if isinstance(key, int) else images.id(key)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if id in labels:
            raise UserError(f"{path}: the image {id} is there twice; remove one of its entries")
        labels[id] = tuple(name for name, present in zip(classes, row, strict=True) if present)
    return labels


def _key(name: str) -> str:
    """What spellings of one class have in common."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _without_suffix(id: str) -> str:
    stem, dot, suffix = id.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else id
