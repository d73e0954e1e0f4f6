"""Any folder of images with a label file.

ROOT/images/SPLIT/, ROOT/images/ or ROOT itself holds the images; ROOT/SPLIT.txt, if there is one, lists the split's ids
(file names, with or without suffix). ROOT/labels.json or labels.csv gives the image labels; ROOT/masks/ID.png, where
there is one, the ground truth. A split without a list and without a folder of its own is all images.
"""

from collections.abc import Sequence
from pathlib import Path

from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES
from cosa_fast.data_pipeline.datasets.labels import class_names
from cosa_fast.data_pipeline.datasets.layout import Layout, file_names, mask_files
from cosa_fast.data_pipeline.datasets.packed import Pack, packing_command
from cosa_fast.errors import UserError, hint
from cosa_fast.files import read_lines

_RESTORE = "restore them or take them off the list"
_NOT_LISTS = ("classes", "readme", "license")  # text files in ROOT that are no split


def find_folder(root: Path, split: str, classes: Sequence[str] | None, pack: Pack | None) -> Layout:
    """Where the things of a split are. UserError: no folder, no images, or the split's name is not among those that the
    folder knows.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; put the images there or set data.root=...")
    images = find_images(root, split, pack)
    named = classes or (root / "classes.txt").is_file()
    return Layout(
        ids=list(images),
        images=list(images.values()),
        listing=root,
        classes=class_names(root, classes, ()) if named else None,
        label_files=(root / "labels.json", root / "labels.csv"),
        masks=mask_files(root / "masks", list(images)),
    )


def find_images(root: Path, split: str, pack: Pack | None) -> dict[str, Path]:
    """Image id (file name without suffix) -> file, in the order of the list, else by name. The files are those of the
    pack where there is one. UserError: there are none, a listed one is missing, or two have one id.
    """
    folder = next(p for p in (root / "images" / split, root / "images", root) if p.is_dir())
    listing = root / f"{split}.txt"
    if not listing.is_file() and folder.name != split:
        _refuse_misspelt(root, split)
    found: dict[str, Path] = {}
    source = folder if pack is None else pack.path
    names = file_names(folder) if pack is None else pack.names
    for path in sorted(source / name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES):
        if path.stem in found:
            raise UserError(f"{path}: {found[path.stem].name} has the same id {path.stem}; rename one of them")
        found[path.stem] = path
    if listing.is_file():
        remedy = _RESTORE if pack is None else f"write the pack anew with: {packing_command('folder', root, split)}"
        found = _listed(listing, source, found, remedy)
    if not found:
        raise UserError(
            f"{listing if listing.is_file() else source}: no images; they end in {', '.join(IMAGE_SUFFIXES)}"
        )
    return found


def _listed(listing: Path, source: Path, found: dict[str, Path], remedy: str) -> dict[str, Path]:
    by_name = {**{path.name: path for path in found.values()}, **found}
    names = read_lines(listing)
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(
            f"{listing}: {len(missing)} of {len(names)} listed images are missing, "
            f"first {source / missing[0]}; {remedy}"
        )
    return {by_name[name].stem: by_name[name] for name in names}


def _refuse_misspelt(root: Path, split: str) -> None:
    """UserError where other splits have a list or a folder: one without is a slip, and taking all images for it would
    train on the test set.
    """
    folders = [p.name for p in (root / "images").iterdir() if p.is_dir()] if (root / "images").is_dir() else []
    known = sorted({*folders, *(p.stem for p in root.glob("*.txt") if p.stem.lower() not in _NOT_LISTS)})
    if known:
        raise UserError(
            f"{root}: no split {split!r}{hint(split, known)}; there are {', '.join(known)}; add {root}/{split}.txt"
        )
