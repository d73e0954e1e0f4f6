"""Preparing a data set: check every image, build its label file, and if asked for write the images into one tar."""

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.colours import colours_of, write_indices
from cosa_fast.data_pipeline.datasets.folder import LABEL_FILES, class_folders
from cosa_fast.data_pipeline.datasets.instances import find_instances, read_instances
from cosa_fast.data_pipeline.datasets.labels import (
    ImageNames,
    Labels,
    encode_labels,
    read_labels,
    require_labels,
    write_labels,
)
from cosa_fast.data_pipeline.datasets.masks import ignore_index, require_usable, values_in
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.packed import require_unique, write_pack
from cosa_fast.data_pipeline.datasets.subset import masked_part
from cosa_fast.data_pipeline.datasets.synthetic import generate_missing
from cosa_fast.data_pipeline.datasets.voc import (
    LISTS,
    MASKS,
    ONEHOT_NAME,
    build_train_aug,
    devkit,
    read_annotations,
)
from cosa_fast.errors import UserError, counted
from cosa_fast.files import require_place, write_text

Size = tuple[int, int]
SOURCES = ("masks", "xml", "npy", "coco")
_MASK_FOLDERS = {"voc": MASKS, "coco": MASKS[1:], "folder": ("masks",)}


def prepare(
    format: str,
    root: Path,
    split: str,
    *,
    source: str | None = None,
    given: Path | None = None,
    output: Path | None = None,
    packed: Path | None = None,
    make_list: bool = False,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Check every image of a split, write its label file unless the user has written one, and then the tar of its
    images if `packed` names one.

    A label file ROOT/labels.json, .csv or .tsv with labels for this split is the user's, and so is a folder for each
    class: they are checked, against the masks too where there are some, and never replaced. classes.txt is written
    where only the labels name the classes.
    source: one of SOURCES; None takes what is there. given: a label file to take the labels from. output: the label
    file to write (None: ROOT/labels.json); its entries for other images stay.
    make_list: write VOC's train_aug.txt first.
    workers: threads that decode. say: is told how labels were understood, counts, what was written and how to train.
    UserError: what `open_dataset` refuses, a source that is not there, images without a label, a file that cannot be
    written or holds other labels; or bad images, each named on stderr before.
    """
    root = devkit(root) if format == "voc" else root
    if format == "synthetic":
        generate_missing(root)
    if make_list:
        say(f"{build_train_aug(root)}: written")
    own = None if source or given or output else users_labels(format, root, split)
    output = output or root / "labels.json"
    if own is None:
        require_place(output, "-o")
    if packed is not None:
        require_place(packed, "--pack")
    dataset = open_dataset(format, root, split, need_labels=own is not None, labels=given, say=say)
    if own is not None:
        labels, sizes = check_labels(dataset, workers, say)
        say(count_labels(dataset.classes, labels))
        say(f"{own}: your labels, left as they are")
    else:
        labels, sizes = collect_labels(format, root, split, dataset, source, given, workers)
        kept = write_merged(output, labels)
        say(count_labels(dataset.classes, labels))
        say(f"{output}: {counted(len(labels), 'image')} of {split}" + (f", {kept} others kept" if kept else ""))
    if dataset.masks_absent:
        say(f"warning: {dataset.masks_absent}")
    if format == "folder":
        write_classes(root / "classes.txt", dataset.classes, say)
    say(describe_sizes(sizes))
    say(suggest(format, root, split, len(dataset)))
    if packed is not None:
        say(pack(dataset, split, packed))


def masks_from_colours(format: str, root: Path, split: str, say: Callable[[str], None] = print) -> None:
    """Write the masks of a set, which show classes as colours, as indices: see `write_indices`. split: a list of the
    set, from which its classes are known. UserError also for generated images.
    """
    if format not in _MASK_FOLDERS:
        raise UserError(f"--masks-from-colours: of {', '.join(_MASK_FOLDERS)}, not of {format}")
    root = devkit(root) if format == "voc" else root
    classes = open_dataset(format, root, split, need_labels=False).classes
    folders = [root / name for name in _MASK_FOLDERS[format] if (root / name).is_dir()]
    if not folders:
        raise UserError(f"{root}: no masks there")
    for folder in folders:
        write_indices(folder, classes, colours_of(root, classes), say)


def collect_labels(
    format: str, root: Path, split: str, dataset: ImageDataset, source: str | None, given: Path | None, workers: int
) -> tuple[Labels, list[Size]]:
    """The labels of every image of the split, and the images' (width, height); all have been decoded by then. Arguments
    and UserErrors as in `prepare`.
    """
    source = str(given) if given is not None else source or find_source(format, root, dataset)
    labels, sizes = inspect(dataset, range(len(dataset)) if source == "masks" else (), workers=workers)
    if given is not None:
        labels = read_labels(given, dataset.classes, ImageNames(dataset.ids))
    elif source == "coco":
        labels = read_instances(find_instances(root, split)[0]).labels
    elif source == "xml":
        labels = read_annotations(root, dataset.ids, dataset.classes)
    elif source == "npy":
        onehot = _onehot(root)
        if onehot is None:
            raise UserError(f"{root}: no {ONEHOT_NAME} there or in {LISTS}; give --labels FILE")
        labels = read_labels(onehot, dataset.classes, ImageNames(dataset.ids))
    require_labels(encode_labels(labels, dataset.ids, dataset.classes, source), dataset.ids, source)
    return {id: labels[id] for id in dataset.ids}, sizes


def users_labels(format: str, root: Path, split: str) -> Path | None:
    """The label file that the user has written for this split, or the folder whose folders name the classes; None if
    there is none with a label of one of its images, or if images that it lacks can be added from what else there is.
    UserError where it cannot be read.
    """
    path = next((root / name for name in LABEL_FILES if (root / name).is_file()), None)
    if format == "folder":
        return path or class_folders(root, split)
    if path is None or path.suffix != ".json":
        return None
    dataset = open_dataset(format, root, split, need_labels=False)
    known = set(dataset.ids) & set(read_labels(path, None, ImageNames(dataset.ids)))
    if known and len(known) < len(set(dataset.ids)):
        try:
            find_source(format, root, dataset)
        except UserError:
            return path
        return None
    return path if known else None


def check_labels(dataset: ImageDataset, workers: int, say: Callable[[str], None]) -> tuple[Labels, list[Size]]:
    """The labels that the set was opened with, and the images' (width, height), after every image and mask has been
    decoded. say: is told of labels that differ from what the mask shows. UserError as in `inspect`.
    """
    masked = [index for index in range(len(dataset)) if dataset.has_mask(index)]
    shown, sizes = inspect(dataset, masked, workers=workers)
    labels = {
        id: tuple(name for name, present in zip(dataset.classes, dataset.labels(index), strict=True) if present)
        for index, id in enumerate(dataset.ids)
    }
    try:
        masked_part(dataset).check_masks(threads=workers)
    except UserError as error:  # what is trained on needs none
        say(f"warning: {error}")
    differing = [id for index in masked if set(shown[id := dataset.ids[index]]) != set(labels[id])]
    if differing:
        say(f"labels and masks differ on {len(differing)} of {len(masked)} images that have both:")
    for id in differing[:5]:
        say(f"  {id}: the label says {_listing(labels[id])}, the mask {_listing(shown[id])}")
    return labels, sizes


def write_classes(path: Path, classes: Sequence[str], say: Callable[[str], None]) -> None:
    """Write the class names, one a line, unless there is such a file; their order is that of the numbers in masks."""
    if path.is_file():
        return
    write_text(path, "\n".join(classes) + "\n")
    say(f"{path}: {counted(len(classes), 'class name')}; from now on a label that is not among them is refused")


def describe_sizes(sizes: Sequence[Size]) -> str:
    """Smallest, middle and largest image by area, as text."""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    low, middle, high = (ordered[index] for index in (0, len(ordered) // 2, -1))
    return f"sizes: from {low[0]}x{low[1]} to {high[0]}x{high[1]}, the middle one {middle[0]}x{middle[1]}"


def suggest(format: str, root: Path, split: str, images: int) -> str:
    """The command that trains on so many images. The schedule is that of PASCAL VOC (12 passes over 10582 images
    in batches of 4; co-training after 3/16, EMA over 1/20 of it), with 2000 iterations at the least."""
    iterations = min(80_000, max(2000, round(12 * images / 4000) * 1000))
    settings = {
        "data.root": shlex.quote(str(root)),
        **({} if (format, split) == ("folder", "train") else {"data.train_split": split}),
        "optim.iterations": iterations,
        "optim.cotrain_after": iterations * 3 // 16,
        "optim.warmup": iterations // 20,
        "optim.batch_size": 4,
        "optim.lr": "6e-5",
        "teacher.momentum": round(1 - 20 / iterations, 5),
        "eval.every": iterations // 8,
    }
    recipe = {"synthetic": "demo"}.get(format, format)
    overrides = " ".join(f"{key}={value}" for key, value in settings.items())
    text = f"train with: python -m cosa_fast.train {recipe}.yaml {overrides}"
    if (format, split) == ("folder", "train"):
        text += f"\nwithout a GPU: python -m cosa_fast.train folder_small.yaml data.root={settings['data.root']}"
    return text


def find_source(format: str, root: Path, dataset: ImageDataset) -> str:
    """What there is to take labels from, a name of SOURCES: COCO instances, VOC annotations, the one-hot file, else the
    masks. UserError if there is nothing.
    """
    if format == "coco":
        return "coco"
    if (root / "Annotations").is_dir():
        return "xml"
    if _onehot(root) is not None:
        return "npy"
    if dataset.has_masks:
        return "masks"
    raise UserError(f"{root}: neither Annotations, {ONEHOT_NAME} nor masks to take labels from; give --labels FILE")


def inspect(dataset: ImageDataset, masks: Collection[int] = (), *, workers: int = 0) -> tuple[Labels, list[Size]]:
    """(image id -> the classes that its mask shows, (width, height) per image), after every image, and the masks of
    those at `masks`, have been decoded by `workers` threads. UserError if any image is bad, each of which is named on
    stderr before; or if masks cannot be used.
    """
    wanted, ignored = set(masks), ignore_index(len(dataset.classes))

    def look(index: int) -> tuple[tuple[str, ...], Size, str, str]:
        try:
            image = dataset.image(index)
        except UserError as error:
            return (), (0, 0), str(error), ""
        try:
            values = values_in(dataset.mask(index, (image.height, image.width))) if index in wanted else ()
        except UserError as error:
            return (), image.size, "", str(error)
        return tuple(dataset.classes[value - 1] for value in values if value not in (0, ignored)), image.size, "", ""

    with ThreadPoolExecutor(max(1, workers), "cosa_fast prepare") as pool:
        names, sizes, of_images, of_masks = zip(*pool.map(look, range(len(dataset))), strict=True)
    bad = [problem for problem in of_images if problem]
    for problem in bad:
        print(f"bad: {problem}", file=sys.stderr)
    if bad:
        raise UserError(
            f"{len(bad)} of {len(dataset)} images are bad (listed above), no label file written; "
            "replace them or take them off the list, and run again"
        )
    require_usable([problem for problem in of_masks if problem], len(wanted))
    return dict(zip(dataset.ids, names, strict=True)), list(sizes)


def write_merged(output: Path, labels: Labels) -> int:
    """Write the label file, keeping the entries of other images that are in it already; returns how many those are.
    UserError if it holds other labels of these images.
    """
    others = read_labels(output, None) if output.is_file() else {}
    differing = [id for id, names in others.items() if id in labels and set(names) != set(labels[id])]
    if differing:
        id = differing[0]
        raise UserError(
            f"{output}: holds other labels of {counted(len(differing), 'image')}, first {id}: {_listing(others[id])} "
            f"there, {_listing(labels[id])} now; it is left as it is: remove it, or write another file with -o FILE"
        )
    kept = {id: names for id, names in others.items() if id not in labels}
    write_labels(output, {**kept, **labels})
    return len(kept)


def count_labels(classes: tuple[str, ...], labels: Labels) -> str:
    """Images per class, and totals, as text."""
    counts = Counter(name for names in labels.values() for name in names)
    width = max(len(name) for name in classes)
    lines = [f"{name:<{width}}  {counts[name]:>7}" for name in classes]
    empty = sum(not names for names in labels.values())
    totals = f"{counted(len(labels), 'image')}, {counted(counts.total(), 'label')}, {counted(empty, 'image')}"
    return "\n".join([*lines, f"{totals} with none of the classes"])


def pack(dataset: ImageDataset, split: str, path: Path) -> str:
    """Write the image files, unchanged, into one tar in the order of the split; returns what to tell the user.
    UserError: an id that is listed twice, a file that cannot be read, or the tar cannot be written.
    """
    require_unique(dataset.ids, split)
    names = (f"{id}{dataset.image_path(index).suffix}" for index, id in enumerate(dataset.ids))
    size = write_pack(path, ((name, dataset.encoded(index)) for index, name in enumerate(names)))
    return f"{path}: {counted(len(dataset), 'image')} of {split}, {size / 2**20:.1f} MiB; train with data.pack={path}"


def _listing(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)) or "none of the classes"


def _onehot(root: Path) -> Path | None:
    return next((path for path in (root / LISTS / ONEHOT_NAME, root / ONEHOT_NAME) if path.is_file()), None)
