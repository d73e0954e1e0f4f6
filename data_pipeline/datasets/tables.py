"""Label tables as spreadsheets and scripts write them: which column names the image, which ones the classes.

With a heading or without, any common separator, one column of names, several, or one per class with 0 and 1. What was
understood is said in a line; what could be understood in two ways is refused with the line and the remedy.
"""

import ast
import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosa_fast.errors import UserError
from cosa_fast.files import read_text

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
EMPTY = ("", "nan", "na", "n/a", "null")
NONE_OF_THEM = ("none", "background", "[]", "-")

_IMAGE_HEADINGS = r"(image|img|file|photo|picture)?[ _-]?(id|name|file|filename|path)?s?|images?|filename|uuid"
_LABEL_HEADINGS = (
    r"(image|class)?[ _-]?(labels?|class|classes|classnames?|"
    r"categor(y|ies)|tags?|names?|species|targets?|objects?)[ _-]?\d*"
)
_YES = ("1", "1.0", "true", "yes", "x")
_NO = ("0", "0.0", "-1", "-1.0", "false", "no")


@dataclass(frozen=True)
class Entry:
    """What one row says. line: for messages, "line 3" or "record 3". names: the classes; None where the row leaves them
    empty, which is no label.
    """

    line: str
    image: str
    names: tuple[str, ...] | None


def read_table(path: Path, is_image: Callable[[str], bool] | None) -> tuple[list[Entry], str]:
    """(entries, what was understood) of a table file. is_image: whether a cell names an image of the set; None where
    that is not known. UserError naming file and line: not a table, no image in it, or unclear columns.
    """
    separator, rows = _split(path)
    where = [f"line {number}" for number, _ in rows]
    entries, columns = read_rows(path, where, [row for _, row in rows], is_image)
    return entries, f"{SEPARATORS[separator]}-separated, {columns}"


def read_rows(
    path: Path, where: Sequence[str], rows: list[list[str]], is_image: Callable[[str], bool] | None
) -> tuple[list[Entry], str]:
    """As `read_table`, of rows of cells; where: a name for each row."""
    if not rows:
        raise UserError(f"{path}: empty; write one row per image: its name, then its classes")
    image = _image_column(rows, is_image)
    heading = _has_heading(rows, image, is_image)
    names = rows[0] if heading else []
    body, where = (rows[1:], where[1:]) if heading else (rows, where)
    if not body:
        raise UserError(f"{path}: a heading and no rows; write one row per image: its name, then its classes")
    width = max(map(len, rows))
    others = [column for column in range(width) if column != image]
    flags = [column for column in others if _is_flag(body, column)]
    title = f"image names in column {_name(names, image)}"
    if heading and flags and not _labelled(names, others):
        _require_clear(path, names, body, others, flags)
        zeros = any(row[column].lower() in _NO for row in body for column in flags if column < len(row))
        ignored = [names[c] for c in others if c not in flags and c < len(names) and names[c]]
        entries = [_flagged(path, line, row, image, flags, names, zeros) for line, row in zip(where, body, strict=True)]
        chosen = ", ".join(names[column] for column in flags)
        return entries, f"{title}, one column per class: {chosen}{_ignoring(ignored)}"
    columns = _label_columns(path, names, body, others)
    ignored = [names[c] or "without a name" for c in others if c not in columns and c < len(names)]
    entries = [_named(path, line, row, image, columns, names) for line, row in zip(where, body, strict=True)]
    shown = ", ".join(_name(names, column) for column in columns if column < len(names) or not names)
    return entries, f"{title}, classes in {shown or 'no column'}{_ignoring(ignored)}"


def split_names(cell: str) -> tuple[str, ...] | None:
    """The class names of a cell: a Python or JSON list, or names between semicolons, bars or commas. () for a word that
    says so (none, background, [], -), None for an empty cell and for nan.
    """
    text = cell.strip()
    if text.lower() in EMPTY:
        return None
    if text.lower() in NONE_OF_THEM:
        return ()
    if text[0] in "[({":
        try:
            value = ast.literal_eval(text)
            parts = [str(item) for item in value]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            parts = re.split(r"[;|,]", text.strip("[](){}"))
    else:
        parts = re.split(r"[;|,]", text)
    names = [" ".join(part.strip().strip("'\"").split()) for part in parts]
    return tuple(dict.fromkeys(name for name in names if name.lower() not in EMPTY)) or (() if text == "()" else None)


def _split(path: Path) -> tuple[str, list[tuple[int, list[str]]]]:
    """(separator, rows with their line numbers). The separator is the first one that follows an image's name."""
    text = read_text(path)
    first = Counter(found.group() for line in text.splitlines() if (found := re.search(r"[,;\t|]", _unquoted(line))))
    separator = first.most_common(1)[0][0] if first else ","
    if len(first) > 1:
        rare = first.most_common()[-1][0]
        for number, line in enumerate(text.splitlines(), 1):
            found = re.search(r"[,;\t|]", _unquoted(line))
            if found and found.group() == rare:
                raise UserError(
                    f"{path}, line {number}: {SEPARATORS[rare]} follows the first cell, elsewhere "
                    f"{SEPARATORS[separator]}; use one separator between the columns throughout"
                )
    try:
        reader = csv.reader(text.splitlines(), delimiter=separator, skipinitialspace=True)
        rows = [(reader.line_num, [" ".join(cell.split()) for cell in row]) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}: not a valid table ({error}); mend the file") from None
    return separator, [(number, row) for number, row in rows if any(row)]


def _unquoted(line: str) -> str:
    return re.sub(r'"[^"]*"', lambda found: "_" * len(found.group()), line)


def _image_column(rows: list[list[str]], is_image: Callable[[str], bool] | None) -> int:
    width = max(map(len, rows))
    if is_image is not None:
        hits = [sum(column < len(row) and is_image(row[column]) for row in rows) for column in range(width)]
        if max(hits):
            return hits.index(max(hits))
    for column, name in enumerate(rows[0]):
        if name and re.fullmatch(_IMAGE_HEADINGS, name.lower()):
            return column
    return 0


def _has_heading(rows: list[list[str]], image: int, is_image: Callable[[str], bool] | None) -> bool:
    """Whether the first row names the columns: its first cell is no image, and its others come in no other row."""
    first = rows[0]
    cell = first[image] if image < len(first) else ""
    if re.search(r"\.(jpe?g|png|bmp|tiff?|webp)$", cell.lower()):
        return False
    if is_image is None:
        return bool(cell) and re.fullmatch(_IMAGE_HEADINGS, cell.lower()) is not None
    if is_image(cell):
        return False
    later = {cell for row in rows[1:] for column, cell in enumerate(row) if column != image}
    return not any(c in later for column, c in enumerate(first) if column != image and c)


def _is_flag(body: list[list[str]], column: int) -> bool:
    values = {row[column].lower() if column < len(row) else "" for row in body}
    return values <= {*_YES, *_NO, ""} and values != {""}


def _labelled(names: list[str], columns: Sequence[int]) -> list[int]:
    """The columns whose heading says that classes are in them."""
    return [c for c in columns if c < len(names) and re.fullmatch(_LABEL_HEADINGS, names[c].lower())]


def _require_clear(path: Path, names: list[str], body: list[list[str]], others: list[int], flags: list[int]) -> None:
    text = [c for c in others if c not in flags and c < len(names) and not _is_numbers(body, c)]
    if text and len(flags) == 1:
        raise UserError(
            f"{path}: classes may be in the column {names[text[0]]} or {names[flags[0]]} may be one; "
            "name the right column 'label', or remove the other"
        )


def _is_numbers(body: list[list[str]], column: int) -> bool:
    return all(_is_number(row[column]) for row in body if column < len(row) and row[column])


def _label_columns(path: Path, names: list[str], body: list[list[str]], others: list[int]) -> list[int]:
    if not names:
        return others
    chosen = _labelled(names, others)
    if not chosen:
        chosen = [c for c in others if not _is_numbers(body, c)]
        named = [names[c] for c in chosen if c < len(names)]
        if len(named) > 1:
            raise UserError(
                f"{path}: classes may be in the columns {', '.join(named)}; name the right one 'label' and remove "
                "the others, or write one column per class with 0 and 1"
            )
    if chosen and max(chosen) >= len(names) - 1:
        chosen += [c for c in others if c >= len(names) and c not in chosen]
    return chosen


def _named(path: Path, line: str, row: list[str], image: int, columns: Sequence[int], names: list[str]) -> Entry:
    if names and len(row) > len(names) and not any(column >= len(names) for column in columns):
        raise UserError(f"{path}, {line}: {len(row)} cells, but the heading has {len(names)}; quote cells with commas")
    cells = [split_names(row[column]) for column in columns if column < len(row)]
    found = [cell for cell in cells if cell is not None]
    classes = tuple(dict.fromkeys(name for cell in found for name in cell)) if found else None
    return Entry(line, _image(path, line, row, image), classes)


def _flagged(
    path: Path, line: str, row: list[str], image: int, flags: Sequence[int], names: list[str], zeros: bool
) -> Entry:
    """zeros: whether absent classes are written as 0 in this table, so that an empty cell is an omission."""
    if len(row) > len(names):
        raise UserError(f"{path}, {line}: {len(row)} cells, but the heading has {len(names)}; mend the line")
    present = []
    for column in flags:
        value = row[column].lower() if column < len(row) else ""
        if value in _YES:
            present.append(names[column])
    marks = [row[column].lower() if column < len(row) else "" for column in flags]
    if "" in marks and zeros:
        raise UserError(f"{path}, {line}: column {names[flags[marks.index('')]]} is empty; write 0 or 1")
    return Entry(line, _image(path, line, row, image), None if set(marks) == {""} else tuple(present))


def _image(path: Path, line: str, row: list[str], image: int) -> str:
    if image >= len(row) or not row[image]:
        raise UserError(f"{path}, {line}: no image name; add it or remove the line")
    return row[image]


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", cell.lower()) is not None


def _name(names: Sequence[str], column: int) -> str:
    return repr(names[column]) if column < len(names) and names[column] else str(column + 1)


def _ignoring(names: Sequence[str]) -> str:
    return f"; ignored: {', '.join(names)}" if names else ""
