"""Preparing a data set: check every image, build its label file, and if asked for write the images into one tar."""

import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.coco import instances_path, read_instances
from cosa_fast.data_pipeline.datasets.images import IGNORE_INDEX
from cosa_fast.data_pipeline.datasets.labels import Labels, encode_labels, read_labels, require_labels, write_labels
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.packed import require_unique, write_pack
from cosa_fast.data_pipeline.datasets.voc import LISTS, ONEHOT_NAME, read_annotations
from cosa_fast.errors import UserError

SOURCES = ("masks", "xml", "npy", "coco")


def prepare(
    format: str,
    root: Path,
    split: str,
    *,
    source: str | None = None,
    given: Path | None = None,
    output: Path | None = None,
    packed: Path | None = None,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Write the label file of a split, after every image has been decoded, and then the tar of its images if `packed`
    names one. Entries of other splits that are in the label file already stay.

    source: one of SOURCES; None takes what is there. given: a label file to take the labels from, unless `source` is
    something else. output: the label file to write (None: ROOT/labels.json). workers: threads that decode. say: is
    told the counts and what was written.
    UserError: what `open_dataset` refuses, a source that is not there, images without a label, a file that cannot be
    written; or bad images, each named on stderr before.
    """
    if workers < 0:
        raise UserError(f"--workers is {workers}; wanted 0 or more")
    if packed is not None and packed.suffix != ".tar":
        raise UserError(f"--pack {packed}: a pack is a tar; choose a name that ends in .tar")
    output = output or root / "labels.json"
    dataset = open_dataset(format, root, split, need_labels=False, labels=given)
    labels = collect_labels(format, root, split, dataset, source, given, workers)
    kept = write_merged(output, labels)
    say(count_labels(dataset.classes, labels))
    say(f"{output}: {len(labels)} images of {split}" + (f", {kept} others kept" if kept else ""))
    if packed is not None:
        say(pack(dataset, split, packed))


def collect_labels(
    format: str, root: Path, split: str, dataset: ImageDataset, source: str | None, given: Path | None, workers: int
) -> Labels:
    """The labels of every image of the split, all of which have been decoded by then. Arguments and UserErrors as in
    `prepare`.
    """
    if source not in (None, "npy"):
        given = None
    source = str(given) if given is not None else source or find_source(format, root, dataset)
    labels = inspect(dataset, masks=source == "masks", workers=workers)
    if given is not None:
        labels = read_labels(given, dataset.classes)
    elif source == "coco":
        labels = read_instances(instances_path(root, split)).labels
    elif source == "xml":
        labels = read_annotations(root, dataset.ids)
    elif source == "npy":
        onehot = _onehot(root)
        if onehot is None:
            raise UserError(f"{root}: no {ONEHOT_NAME} there or in {LISTS}; give --labels FILE")
        labels = read_labels(onehot, dataset.classes)
    require_labels(encode_labels(labels, dataset.ids, dataset.classes, source), dataset.ids, source)
    return {id: labels[id] for id in dataset.ids}


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


def inspect(dataset: ImageDataset, *, masks: bool = False, workers: int = 0) -> Labels:
    """Image id -> the classes that its mask shows (none if `masks` is False), after every image, and with `masks` its
    mask too, has been decoded by `workers` threads. UserError if any is bad; each is named on stderr before.
    """

    def look(index: int) -> tuple[tuple[str, ...], str | None]:
        try:
            image = dataset.image(index)
            values = np.unique(dataset.mask(index, (image.height, image.width))) if masks else ()
        except UserError as error:
            return (), str(error)
        return tuple(dataset.classes[value - 1] for value in values if value not in (0, IGNORE_INDEX)), None

    with ThreadPoolExecutor(max(1, workers), "cosa_fast prepare") as pool:
        names, problems = zip(*pool.map(look, range(len(dataset))), strict=True)
    bad = [problem for problem in problems if problem]
    for problem in bad:
        print(f"bad: {problem}", file=sys.stderr)
    if bad:
        raise UserError(
            f"{len(bad)} of {len(dataset)} images are bad (listed above), no label file written; "
            "replace them or take them off the list, and run again"
        )
    return dict(zip(dataset.ids, names, strict=True))


def write_merged(output: Path, labels: Labels) -> int:
    """Write the label file, keeping the entries of other splits that are in it already; returns how many those are."""
    others = read_labels(output, None) if output.is_file() else {}
    kept = {id: names for id, names in others.items() if id not in labels}
    write_labels(output, {**kept, **labels})
    return len(kept)


def count_labels(classes: tuple[str, ...], labels: Labels) -> str:
    """Images per class, and totals, as text."""
    counts = Counter(name for names in labels.values() for name in names)
    width = max(len(name) for name in classes)
    lines = [f"{name:<{width}}  {counts[name]:>7}" for name in classes]
    empty = sum(not names for names in labels.values())
    lines.append(f"{len(labels)} images, {counts.total()} labels, {empty} images with none of the classes")
    return "\n".join(lines)


def pack(dataset: ImageDataset, split: str, path: Path) -> str:
    """Write the image files, unchanged, into one tar in the order of the split; returns what to tell the user.
    UserError: an id that is listed twice, a file that cannot be read, or the tar cannot be written.
    """
    require_unique(dataset.ids, split)
    names = (f"{id}{dataset.image_path(index).suffix}" for index, id in enumerate(dataset.ids))
    size = write_pack(path, ((name, dataset.encoded(index)) for index, name in enumerate(names)))
    return f"{path}: {len(dataset)} images of {split}, {size / 2**20:.1f} MiB; train with data.pack={path}"


def _onehot(root: Path) -> Path | None:
    return next((path for path in (root / LISTS / ONEHOT_NAME, root / ONEHOT_NAME) if path.is_file()), None)
