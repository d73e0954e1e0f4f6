"""Preparing a data set: check every image, build its label file where it has no labels, and if asked for write the
images into one tar."""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.colours import colours_of, write_indices
from cosa_fast.data_pipeline.datasets.instances import find_instances, read_instances
from cosa_fast.data_pipeline.datasets.labels import (
    LABEL_FILES,
    Labels,
    encode_labels,
    read_labels,
    require_labels,
    write_labels,
)
from cosa_fast.data_pipeline.datasets.masks import ignore_index, require_usable, values_in
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.packed import require_unique, write_pack
from cosa_fast.data_pipeline.datasets.sources import in_words
from cosa_fast.data_pipeline.datasets.subset import masked_part
from cosa_fast.data_pipeline.datasets.suggestion import suggest
from cosa_fast.data_pipeline.datasets.synthetic import generate_missing
from cosa_fast.data_pipeline.datasets.voc import (
    LISTS,
    MASKS,
    ONEHOT_NAME,
    build_train_aug,
    devkit,
    read_annotations,
)
from cosa_fast.errors import UserError, counted, first_line
from cosa_fast.files import read_json, require_place, write_text

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
    """Check every image of a split and what labels it has, against the masks too where the user has written them; write
    the label file, and then the tar of its images if `packed` names one.

    ROOT/labels.json gets the labels that it lacks: of VOC and COCO those of the format's own files, and those that only
    masks can give; what users write for a folder stays in what they wrote. All are written where source, given or
    output asks for it. classes.txt is written where only the labels of a folder name the classes.
    source: one of SOURCES, to take all labels from; None takes what is there. given: a label file to take them from in
    place of all that is there.
    output: the label file to write (None: ROOT/labels.json); its entries for other images stay.
    make_list: write VOC's train_aug.txt first.
    workers: threads that decode. say: is told how labels were understood, counts, where they are from, what was written
    and how to train. UserError: what `open_dataset` refuses, a source that is not there, images without a label, a file
    that cannot be written or holds other labels; or bad images, each named on stderr before.
    """
    root = devkit(root) if format == "voc" else root
    if format == "synthetic":
        generate_missing(root)
    if make_list:
        say(f"{build_train_aug(root)}: written")
    place = output or root / "labels.json"
    source = None if given else source
    if packed is not None:
        require_place(packed, "--pack")
    dataset = open_dataset(format, root, split, need_labels=False, labels=given, say=say)
    everything = bool(source or given or output)
    filled = [] if source else _to_be_filled(root, dataset, given)
    added = filled if format == "folder" else _not_in(place, dataset)
    if everything or added:
        require_place(place, "-o")
    if source:
        labels, sizes = collect_labels(root, split, dataset, source, workers)
        origins: list[Path | str | None] = [source] * len(labels)
    else:
        compared = [] if everything else _written_by_the_user(format, dataset)
        labels, sizes = check_labels(dataset, compared, filled, workers, say)
        origins = [origin or "masks" for origin in dataset.label_origins]
    say(count_labels(dataset.classes, labels))
    written = labels if everything else {dataset.ids[index]: labels[dataset.ids[index]] for index in added}
    # A training looks for it without being told.
    known = format != "coco" and place.resolve() == (root / "labels.json").resolve()
    overruled = _overruled(format, root, split, dataset.classes, labels) if known and (source or given) else ""
    words = in_words([*dataset.label_places, source or "masks"], origins)
    use = f"; to use it: data.labels={place}" if everything and not known else ""
    say(f"labels from {words}; {_write(place, written, split, dataset)}{use}{overruled}")
    if dataset.masks_absent:
        say(f"warning: {dataset.masks_absent}")
    if format == "folder":
        write_classes(root / "classes.txt", dataset.classes, say)
    say(describe_sizes(sizes))
    say(suggest(format, root, split, len(dataset), place if use else None))
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
    root: Path, split: str, dataset: ImageDataset, source: str, workers: int
) -> tuple[Labels, list[Size]]:
    """The labels of every image of the split from a source, one of SOURCES, and the images' (width, height); all have
    been decoded by then. UserErrors as in `prepare`.
    """
    labels, sizes = inspect(dataset, range(len(dataset)) if source == "masks" else (), workers=workers)
    if source == "coco":
        labels = read_instances(find_instances(root, split)[0]).labels
    elif source == "xml":
        labels = read_annotations(root, dataset.ids, dataset.classes)
    elif source == "npy":
        onehot = next((path for path in (root / LISTS / ONEHOT_NAME, root / ONEHOT_NAME) if path.is_file()), None)
        if onehot is None:
            raise UserError(f"{root}: no {ONEHOT_NAME} there or in {LISTS}; give --labels FILE")
        labels = read_labels(onehot, dataset.classes, dataset.known)
    require_labels(encode_labels(labels, dataset.ids, dataset.classes, source), dataset.ids, source)
    return {id: labels[id] for id in dataset.ids}, sizes


def check_labels(
    dataset: ImageDataset, compared: Sequence[int], filled: Sequence[int], workers: int, say: Callable[[str], None]
) -> tuple[Labels, list[Size]]:
    """The labels that the set was opened with, those at `filled` as their masks show them, and the images' (width,
    height), after every image has been decoded. say: is told which labels at `compared` differ from what the mask
    shows, and of masks that cannot be evaluated. UserError as in `inspect`.
    """
    shown, sizes = inspect(dataset, {*compared, *filled}, workers=workers)
    labels = {id: _names(dataset, index) for index, id in enumerate(dataset.ids) if dataset.has_label(index)}
    if compared:
        try:
            masked_part(dataset).check_masks(threads=workers)
        except UserError as error:  # what is trained on needs none
            say(f"warning: {error}")
    differing = [id for index in compared if set(shown[id := dataset.ids[index]]) != set(labels[id])]
    if differing:
        say(f"labels and masks differ on {len(differing)} of {len(compared)} images that have both:")
    for id in differing[:5]:
        say(f"  {id}: the label says {_listing(labels[id])}, the mask {_listing(shown[id])}")
    labels.update({dataset.ids[index]: shown[dataset.ids[index]] for index in filled})
    return {id: labels[id] for id in dataset.ids}, sizes


def _to_be_filled(root: Path, dataset: ImageDataset, given: Path | None) -> list[int]:
    """The images without a label, which their masks can give. UserError for those that have no mask either, and where a
    label file is to give them all.
    """
    missing = [index for index in range(len(dataset)) if not dataset.has_label(index)]
    bare = missing if given else [index for index in missing if not dataset.has_mask(index)]
    if len(bare) == len(dataset) and not given:
        raise UserError(
            f"{root}: no image labels in {dataset.label_source}, nor masks to take them from; give --labels FILE"
        )
    if bare:
        ids = [dataset.ids[index] for index in bare]
        where = f"first {ids[0]}" + ("" if given else ", nor a mask to take it from")
        raise UserError(
            f"{dataset.label_source}: no label for {len(bare)} of {len(dataset)} images, {where}; add them "
            "([] in JSON and the word none in a table mean: none of the classes), or take the images off the list"
        )
    return missing


def _not_in(place: Path, dataset: ImageDataset) -> list[int]:
    """The images whose labels are not from that file."""
    return [index for index, origin in enumerate(dataset.label_origins) if origin != place]


def _written_by_the_user(format: str, dataset: ImageDataset) -> list[int]:
    """The images with masks whose labels are in a label file or, of a folder, in the names of folders."""
    return [
        index
        for index, origin in enumerate(dataset.label_origins)
        if origin is not None and (format == "folder" or origin.name in LABEL_FILES) and dataset.has_mask(index)
    ]


def _write(place: Path, labels: Labels, split: str, dataset: ImageDataset) -> str:
    """Write the labels where there are any; what was done, in words."""
    if not labels:
        return "left as they are, nothing written"
    kept = write_merged(place, labels, dataset)
    more = f", {counted(kept, 'other image')} kept in it" if kept else ""
    return f"written to {place}: {counted(len(labels), 'image')} of {split}{more}"


def _overruled(format: str, root: Path, split: str, classes: Sequence[str], labels: Labels) -> str:
    """Which other labels of the set differ from those to be written to its labels.json, in words; empty if none does,
    or if they cannot be read.
    """
    try:
        before = open_dataset(format, root, split, need_labels=False, classes=classes)
    except UserError:
        return ""
    differing = {
        before.ids[index]: origin
        for index, origin in enumerate(before.label_origins)
        if origin not in (None, root / "labels.json") and set(_names(before, index)) != set(labels[before.ids[index]])
    }
    places = " and ".join(dict.fromkeys(str(origin) for origin in differing.values()))
    what = f"other labels of {counted(len(differing), 'image')}, first {next(iter(differing), '')}"
    return f"; it counts before {places}, where there are {what}" if differing else ""


def write_classes(path: Path, classes: Sequence[str], say: Callable[[str], None]) -> None:
    """Write the class names, one a line, unless there is such a file; their order is that of the numbers in masks. A
    training does without: a folder that cannot be written is said, and no more.
    """
    if path.is_file():
        return
    try:
        write_text(path, "\n".join(classes) + "\n")
    except UserError as error:
        listed = json.dumps(classes, ensure_ascii=False)
        say(f"warning: {first_line(error)}, or keep the classes with: data.classes={shlex.quote(listed)}")
        return
    say(f"{path}: {counted(len(classes), 'class name')}; from now on a label that is not among them is refused")


def describe_sizes(sizes: Sequence[Size]) -> str:
    """Smallest, middle and largest image by area, as text."""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    low, middle, high = (ordered[index] for index in (0, len(ordered) // 2, -1))
    return f"sizes: from {low[0]}x{low[1]} to {high[0]}x{high[1]}, the middle one {middle[0]}x{middle[1]}"


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


def write_merged(output: Path, labels: Labels, dataset: ImageDataset) -> int:
    """Write the label file, keeping the entries of other images that are in it already; returns how many those are.
    UserError if it holds other labels of these images, or records, whose further columns would be lost.
    """
    if output.is_file() and isinstance(read_json(output), list):
        raise UserError(
            f"{output}: holds records, which may say more than the labels; it is left as it is: add the labels of "
            f"{counted(len(labels), 'image')} to it, or write another file with -o FILE"
        )
    known = copy(dataset.known)
    known.complete = False  # the file may be that of other sets, too
    others = read_labels(output, dataset.classes, known) if output.is_file() else {}
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


def _names(dataset: ImageDataset, index: int) -> tuple[str, ...]:
    return tuple(name for name, present in zip(dataset.classes, dataset.labels(index), strict=True) if present)
