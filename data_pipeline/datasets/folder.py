"""Any folder of images with a label file, or with one folder per class.

ROOT/images/SPLIT/, ROOT/SPLIT/, ROOT/images/ or ROOT itself holds the images, or folders of them; an image's id is its
path from there, without suffix. ROOT/SPLIT.txt, if there is one, lists the split's ids (file names, with or without
suffix). ROOT/labels.json, .csv or .tsv gives the image labels; without such a file the folder that an image lies in
(cat/xxx.jpg) is its class, and so it is of images which the file lacks, if classes.txt has the folder's name.
ROOT/masks/ID.png, or masks/SPLIT/ID.png, where there is one, is the ground truth. Splits are what lists or folders are
named after, and `all` every image, where these do not lie in folders of splits. Without any list or such folder train
and val are every image, too.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES
from cosa_fast.data_pipeline.datasets.labels import LABEL_FILES, ImageNames, Labels, class_names, spelt_as
from cosa_fast.data_pipeline.datasets.layout import Layout
from cosa_fast.data_pipeline.datasets.masks import find_masks
from cosa_fast.data_pipeline.datasets.packed import Pack, packing_command
from cosa_fast.errors import UserError, counted, hint
from cosa_fast.files import nearest, read_lines

ALL = "all"
# Without lists, and without folders of splits, each is all images.
_WITHOUT_LISTS = ("train", "val")
_RESTORE = "restore them or take them off the list"
_NOT_LISTS = (
    "classes",
    "colours",
    "readme",
    "license",
    "requirements",
    "notes",
)  # text files in ROOT that are no split
_SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "test", "trainval")
_NOT_IMAGES = ("masks",)


def find_folder(root: Path, split: str, classes: Sequence[str] | None, pack: Pack | None) -> Layout:
    """Where the things of a split are. UserError: no folder, no images, two label files, or the split's name is not
    among those that the folder knows.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder{nearest(root)}; put the images there or set data.root=...")
    images = find_images(root, split, pack)
    names = class_names(root, classes, ()) if classes or (root / "classes.txt").is_file() else None
    there = [name for name in LABEL_FILES if (root / name).is_file()]
    if len(there) > 1 and there[0] != LABEL_FILES[0]:
        raise UserError(f"{root}: holds {' and '.join(there)}; keep one of them, or name it with data.labels=...")
    known = {} if pack is not None else _names(root, split, images)
    by_folder = all("/" in id for id in images) and not (there and names is None)

    def of_folders(some: Sequence[str]) -> Labels:
        ids = images if names is not None else [*images, *_of_other_splits(root, split)]
        return _folder_labels(ids, names if there else None)

    return Layout(
        ids=list(images),
        images=list(images.values()),
        listing=root,
        classes=names,
        label_files=tuple(root / name for name in LABEL_FILES),
        annotations=(_folder_of(root, split), of_folders) if by_folder else None,
        masks=find_masks([root / "masks" / split, root / "masks"], list(images), others=known),
        everything=frozenset(known.values()) or None,
        aliases=known,
        notes=() if split == "train" or _is_named(root, split) else (f"all {counted(len(images), 'image')} of {root}",),
    )


def find_images(root: Path, split: str, pack: Pack | None) -> dict[str, Path]:
    """Image id (path in the split's folder, without suffix) -> file, in the order of the list, else by name. The files
    are those of the pack where there is one. UserError: there are none, a listed one is missing, or two have one id.
    """
    folder = _folder_of(root, split)
    listing = root / f"{split}.txt"
    if not _is_named(root, split):
        _require_known(root, split)
    found: dict[str, Path] = {}
    source = folder if pack is None else pack.path
    names = (
        _image_names(folder) if pack is None else [n for n in pack.names if Path(n).suffix.lower() in IMAGE_SUFFIXES]
    )
    for name in sorted(names):
        id = _id(name)
        if id in found:
            raise UserError(f"{source / name}: {found[id].name} has the same id {id}; rename one of them")
        found[id] = source / name
    if listing.is_file():
        remedy = _RESTORE if pack is None else f"write the pack anew with: {packing_command('folder', root, split)}"
        found = _listed(listing, source, found, remedy)
    if not found:
        raise UserError(
            f"{listing if listing.is_file() else source}: no images; they end in {', '.join(IMAGE_SUFFIXES)}"
        )
    return found


def splits(root: Path) -> list[str]:
    """What lists and folders are named after, sorted."""
    lists = [path.stem for path in root.glob("*.txt") if path.stem.lower() not in _NOT_LISTS]
    return sorted({*_split_folders(root), *lists})


def _folder_of(root: Path, split: str) -> Path:
    return next(p for p in (root / "images" / split, root / split, root / "images", root) if p.is_dir())


def _id(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _image_names(folder: Path) -> list[str]:
    """The images in a folder; where there is none, those in its folders ("cat/xxx.jpg"), no hidden one and no mask."""
    direct = [entry.name for entry in folder.iterdir() if _is_image(entry)]
    if direct:
        return direct
    below = (path.relative_to(folder) for path in folder.rglob("*") if _is_image(path))
    return [
        path.as_posix()
        for path in below
        if path.parts[0] not in _NOT_IMAGES and not any(part.startswith(".") for part in path.parts)
    ]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _folder_labels(ids: Iterable[str], classes: Sequence[str] | None) -> Labels:
    """The folder of each image as its class; of those images alone whose folder is among `classes`, where given."""
    spelling, labels = spelt_as(classes or ()), Labels()
    for id in ids:
        name = spelling(id.partition("/")[0])
        if classes is None or name in classes:
            labels[id] = (name,)
    return labels


def _of_other_splits(root: Path, split: str) -> Iterator[str]:
    """The ids in folders of all splits but those of tests: which classes there are must not depend on the split that is
    opened first.
    """
    for name in splits(root):
        if name != split and not name.lower().startswith("test"):
            with suppress(UserError):  # a text file that is no list
                yield from (id for id in find_images(root, name, None) if "/" in id)


def _names(root: Path, split: str, images: dict[str, Path]) -> dict[str, str]:
    """Path -> id of all images, those of other splits included: the paths from the folder of their split, from images/
    and from ROOT, without suffix. An image that is not of this split has the path from the nearest folder above both as
    its id.
    """
    base = "images/" if (root / "images").is_dir() else ""
    split_folders = [f"{place}{name}/" for name in _split_folders(root) for place in (base, "")]
    own = {path.relative_to(root).as_posix(): id for id, path in images.items()}
    above = (f"{_folder_of(root, split).relative_to(root).as_posix()}/".removeprefix("./"), base, "")
    known = {id: id for id in images}
    for folder in dict.fromkeys((base, *split_folders)):
        # Texts rather than paths: five times as fast, and there may be many images.
        for path in (folder + name for name in (_image_names(root / folder) if (root / folder).is_dir() else ())):
            stem = path.rpartition(".")[0]
            paths = [stem[len(place) :] for place in above if stem.startswith(place)]
            for name in (*paths, stem[len(folder) :]):
                known.setdefault(name, own.get(path, paths[0]))
    return known


def _split_folders(root: Path) -> list[str]:
    """Folders that stand for splits: those whose names are usual, and then their neighbours below images/."""
    found = [name for name in _SPLIT_FOLDERS if (root / name).is_dir()]
    below = [p.name for p in (root / "images").iterdir() if p.is_dir()] if (root / "images").is_dir() else []
    return found + (below if any(name.lower() in _SPLIT_FOLDERS for name in below) else [])


def _listed(listing: Path, source: Path, found: dict[str, Path], remedy: str) -> dict[str, Path]:
    known = ImageNames(found)
    files = {path.relative_to(source).as_posix(): id for id, path in found.items()}
    names = [name.replace("\\", "/").removeprefix("./") for name in read_lines(listing)]
    try:
        ids = [files.get(name) or known.find(name) for name in names]
    except UserError as error:
        raise UserError(f"{listing}: {error}") from None
    missing = [name for name, id in zip(names, ids, strict=True) if id is None]
    if missing:
        raise UserError(
            f"{listing}: {len(missing)} of {len(names)} listed images are missing, "
            f"first {source / missing[0]}{known.nearest(missing[0])}; {remedy}"
        )
    return {id: found[id] for id in ids if id is not None}


def _is_named(root: Path, split: str) -> bool:
    """Whether a list or a folder is named after the split."""
    return (root / f"{split}.txt").is_file() or _folder_of(root, split) in (root / "images" / split, root / split)


def _require_known(root: Path, split: str) -> None:
    """UserError for a split without list and folder, unless it stands for all images: a slip that did would train on
    the test set.
    """
    folders, named = _split_folders(root), splits(root)
    if split in (*([] if folders else [ALL]), *([] if named else _WITHOUT_LISTS)):
        return
    known = named or _WITHOUT_LISTS
    there = f"{', '.join(known)}{'' if folders else f', and {ALL} for all images'}"
    raise UserError(f"{root}: no split {split!r}{hint(split, known)}; there are {there}; add {root}/{split}.txt")
