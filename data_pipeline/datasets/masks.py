"""Masks as files: where they are, what they hold, and sets of them that cannot be right."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES, opened, raw_mode
from cosa_fast.errors import UserError, counted

IGNORE_INDEX = 255
# The ignore index of masks whose classes leave no room for 255 in a byte; in their files it is 65535.
WIDE_IGNORE_INDEX = -1
_MOST_IN_A_BYTE = 254
_IGNORED_IN_16_BITS = 0xFFFF
# Grayscale of 2 and 4 bits, which PIL stretches to 8.
_STRETCHED = {"L;2": 85, "L;4": 17}
OFFER = "write indices with: python -m cosa_fast.prepare --masks-from-colours (see docs/data.md)"


def mask_type(num_classes: int) -> type[np.uint8] | type[np.int16]:
    """The type of masks of so many foreground classes: uint8 up to 254, int16 beyond."""
    return np.uint8 if num_classes <= _MOST_IN_A_BYTE else np.int16


def ignore_index(num_classes: int) -> int:
    """What marks a pixel without truth in masks of that type: 255, or -1."""
    return IGNORE_INDEX if num_classes <= _MOST_IN_A_BYTE else WIDE_IGNORE_INDEX


def voc_palette() -> np.ndarray:
    """(256, 3) uint8, the colours that PASCAL VOC gives to indices: bit j of red, green, blue, counted from the top, is
    bit 3j, 3j + 1, 3j + 2 of the index.
    """
    index, channel, bit = np.ogrid[:256, :3, :8]
    return ((((index >> (3 * bit + channel)) & 1) << (7 - bit)).sum(-1)).astype(np.uint8)


_VOC = {tuple(colour): index for index, colour in enumerate(voc_palette().tolist())}


def read_mask(path: Path, num_classes: int) -> np.ndarray:
    """(H, W) class indices in {0..num_classes} and the ignore index, of `mask_type`, as stored (masks are never
    rotated): of a palette image or grayscale of 1 to 16 bits. 255 is the ignore index; in files of 16 bits 65535 too.

    UserError naming the file: unreadable, colours in place of indices, JPEG (whose values are not exact), a value that
    is no class, or a palette that shows VOC's colours at other indices than VOC's.
    """
    with opened(path) as image:
        if image.format == "JPEG":
            raise UserError(f"{path}: JPEG changes the values of a mask; save masks as PNG")
        stretched = _STRETCHED.get(raw_mode(image), 1)
        wide = image.mode.startswith("I")
        if not (wide or image.mode in ("P", "L", "1")):
            raise UserError(
                f"{path}: a mask's values are class indices (palette or grayscale), this one shows colours "
                f"(mode {image.mode}); {OFFER}"
            )
        stored = np.array(image).astype(np.int32 if wide else np.uint8) // np.array(stretched, np.uint8)
        colours = image.getpalette() if image.mode == "P" else None
    if wide and (stored.min() < 0 or stored.max() > _IGNORED_IN_16_BITS):
        _require_classes(path, np.array([stored.min(), stored.max()]), num_classes)
    narrow = num_classes <= _MOST_IN_A_BYTE
    unknown = ([IGNORE_INDEX] if narrow or not wide else []) + ([_IGNORED_IN_16_BITS] if wide else [])
    used = np.setdiff1d(values_in(stored), unknown)
    if colours is not None:
        _require_own_palette(path, used, colours)
    _require_classes(path, used, num_classes)
    mask = stored.astype(mask_type(num_classes))  # 65535 becomes 255, or -1
    if not (narrow or wide):
        mask[stored == IGNORE_INDEX] = WIDE_IGNORE_INDEX
    return mask


def values_in(mask: np.ndarray) -> np.ndarray:
    """The values that occur in a mask, in ascending order; negative ones only in int16."""
    return np.unique(mask) if mask.dtype == np.int16 else np.flatnonzero(np.bincount(mask.ravel()))


@dataclass(frozen=True)
class MaskFiles:
    """files: a mask per image, whether it exists or not; None if not one exists. absent: if so, although there is a
    folder with images for masks, the reason in words; else empty.
    """

    files: list[Path] | None
    absent: str = ""


def find_masks(
    folders: Sequence[Path],
    ids: Sequence[str],
    *,
    others: Collection[str] = (),
    also: Callable[[str], Sequence[str]] = lambda id: (),
) -> MaskFiles:
    """ID.png, or ID with another suffix of an image, in the first of `folders` that has it. others: ids of images that
    are not asked for, whose masks may be there. also: other names, without suffix, under which the mask of an id may
    be. No mask is opened.
    """
    there = {folder: _by_stem(folder) for folder in folders}

    def find(id: str) -> Path | None:
        return next((files[name] for name in (id, *also(id)) for files in there.values() if name in files), None)

    found = [find(id) for id in ids]
    if any(found):
        return MaskFiles([path or folders[0] / f"{id}.png" for path, id in zip(found, ids, strict=True)])
    strange = sorted(path for files in there.values() for path in files.values())
    names = {end for files in there.values() for name in files for end in (name, name.rpartition("/")[2])}
    if not strange or not ids or not names.isdisjoint(others):
        return MaskFiles(None)
    return MaskFiles(
        None,
        f"{strange[0].parent}: {counted(len(strange), 'file')}, first {strange[0].name}, but none is named after an "
        f"image of the evaluation, first {ids[0]}; name masks ID.png, or move them away to train without",
    )


def require_usable(problems: Sequence[str], count: int) -> None:
    """UserError if any of `count` masks has a problem: the first of them, and how many there are."""
    if problems:
        more = f" ({len(problems)} of {count} masks cannot be used)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def require_sound(shown: Iterable[np.ndarray], where: str) -> None:
    """UserError if masks, of each of which `shown` has the values, cannot be the truth of anything."""
    images: Counter[int] = Counter(value for values in shown for value in values.tolist())
    if not images or any(value not in (0, IGNORE_INDEX, WIDE_IGNORE_INDEX) for value in images):
        return
    if 0 not in images:
        value = IGNORE_INDEX if IGNORE_INDEX in images else _IGNORED_IN_16_BITS
        raise UserError(f"{where}: the masks hold {value} alone, which means: not known; give the right masks")
    if IGNORE_INDEX in images:
        raise UserError(
            f"{where}: the masks hold 0 and 255 alone, and 255 means: not known. If it marks the object, its index is "
            f"1; {OFFER}"
        )
    raise UserError(f"{where}: no mask has a pixel of any class; give the right masks, or train without")


def _by_stem(folder: Path) -> dict[str, Path]:
    """Path below `folder` without suffix -> file, .png first."""
    if not folder.is_dir():
        return {}
    files = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    files.sort(key=lambda path: (path.suffix != ".png", path.name), reverse=True)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def _require_classes(path: Path, used: np.ndarray, num_classes: int) -> None:
    unknown = used[(used < 0) | (used > num_classes)]
    if unknown.size:
        raise UserError(
            f"{path}: value {unknown[0]} is neither a class (0..{num_classes}) nor 255; "
            "check the mask or the list of classes"
        )


def _require_own_palette(path: Path, used: np.ndarray, colours: list[int]) -> None:
    """UserError if each used colour is one of VOC's, but of another index: a program has sorted the palette anew."""
    shown = [(index, tuple(colours[3 * index : 3 * index + 3])) for index in used.tolist()]
    moved = [(index, colour) for index, colour in shown if _VOC.get(colour, index) != index]
    if moved and all(colour in _VOC for _, colour in shown):
        index, colour = moved[0]
        raise UserError(
            f"{path}: index {index} has the colour {colour} of VOC's class {_VOC[colour]}: its palette was sorted "
            f"anew; {OFFER}"
        )
