"""Masks that show classes as colours, written anew as indices."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES, opened
from cosa_fast.data_pipeline.datasets.labels import spelt_as
from cosa_fast.data_pipeline.datasets.masks import IGNORE_INDEX, mask_type, read_mask, voc_palette
from cosa_fast.errors import UserError, counted, hint
from cosa_fast.files import read_lines

COLOURS_NAME = "colours.txt"
_BACKGROUND = ("background", "_background_")
_IGNORED = ("ignore", "void", "unlabeled")

Colour = tuple[int, int, int]


def write_indices(
    folder: Path, classes: Sequence[str], colours: Mapping[Colour, int], say: Callable[[str], None]
) -> None:
    """Write every mask of `folder` anew as a PNG of class indices. The folder as it was becomes FOLDER_colours; masks
    that hold indices already keep them.

    colours: class index by (red, green, blue). Where there is one class and no mask has another colour than black and
    white, white is that class. UserError: a colour that is no class's, a file that is no mask, no masks,
    FOLDER_colours is there already, or the folder cannot be written; nothing is changed then.
    """
    kept = folder.with_name(f"{folder.name}_colours")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of masks")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")
    if not files:
        raise UserError(f"{folder}: no masks in it")
    if kept.exists():
        raise UserError(f"{kept}: is there already; move it away, the masks as they are would be kept there")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            new = Path(scratch) / "new"
            for path in files:
                output = (new / path.relative_to(folder)).with_suffix(".png")
                if output.exists():
                    raise UserError(f"{path}: another mask of that name has another suffix; remove one of them")
                output.parent.mkdir(parents=True, exist_ok=True)
                _indices(path, colours, classes).save(output)
            folder.rename(kept)
            shutil.move(new, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another place") from None
    say(f"{folder}: {counted(len(files), 'mask')} as indices; as they were: {kept}")


def colours_of(root: Path, classes: Sequence[str]) -> dict[Colour, int]:
    """Class index by colour: as ROOT/colours.txt says, whose lines are "NAME RED GREEN BLUE" (also with commas or
    colons), background and ignore among the names; else as PASCAL VOC does. UserError for another line.
    """
    path = root / COLOURS_NAME
    if not path.is_file():
        count = min(len(classes), IGNORE_INDEX - 1)
        return {_triple(voc_palette()[index]): index for index in (*range(count + 1), IGNORE_INDEX)}
    index = {**dict.fromkeys(_BACKGROUND, 0), **dict.fromkeys(_IGNORED, IGNORE_INDEX)}
    index |= {name: number for number, name in enumerate(classes, 1)}
    spelling, found = spelt_as(tuple(index)), dict[Colour, int]()
    for line in read_lines(path):
        if line.startswith("#"):
            continue
        words = line.replace(",", " ").replace(":", " ").split()
        name, values = spelling(" ".join(words[:-3])), words[-3:]
        if len(words) < 4 or not all(value.isdecimal() and int(value) < 256 for value in values):
            raise UserError(f"{path}: {line!r} is not NAME RED GREEN BLUE with numbers from 0 to 255; correct it")
        if name not in index:
            raise UserError(f"{path}: {name!r} is no class{hint(name, classes)}; correct it or the list of classes")
        found[_triple(np.array(values, int))] = index[name]
    return {(0, 0, 0): 0, **found}


def _indices(path: Path, colours: Mapping[Colour, int], classes: Sequence[str]) -> Image.Image:
    try:
        values = read_mask(path, len(classes))
        if set(np.unique(values).tolist()) != {0, IGNORE_INDEX}:
            return _as_image(values, classes)
    except UserError:
        pass  # no indices; colours, if anything
    with opened(path) as image:
        if image.format == "JPEG":
            raise UserError(f"{path}: JPEG changes the colours of a mask; save masks as PNG")
        pixels = np.array(image.convert("RGB")).astype(np.int64)
    code = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
    shown, places = np.unique(code, return_inverse=True)
    triples = [(value >> 16, value >> 8 & 255, value & 255) for value in shown.tolist()]
    if len(classes) == 1 and set(triples) <= {(0, 0, 0), (255, 255, 255)}:
        colours = {(0, 0, 0): 0, (255, 255, 255): 1}
    for triple, count in zip(triples, np.bincount(places.ravel()).tolist(), strict=True):
        if triple not in colours:
            raise UserError(
                f"{path}: the colour {triple} ({counted(count, 'pixel')}) is that of no class; name the classes' "
                f"colours in {COLOURS_NAME}, one a line: NAME RED GREEN BLUE"
            )
    chosen = np.array([colours[triple] for triple in triples])[places.reshape(code.shape)]
    return _as_image(chosen, classes)


def _as_image(indices: np.ndarray, classes: Sequence[str]) -> Image.Image:
    if mask_type(len(classes)) is np.int16:
        return Image.fromarray(np.where(indices < 0, 0xFFFF, indices).astype(np.uint16))
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    return image


def _triple(values: np.ndarray) -> Colour:
    red, green, blue = values.tolist()
    return red, green, blue
