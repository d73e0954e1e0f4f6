"""What `prepare` does: label files, checks of whole sets, packs."""

import sys
from collections import Counter
from pathlib import Path

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.coco import instances_path, read_instances
from cosa_fast.data_pipeline.datasets.inspection import Finding, inspect, labels_of
from cosa_fast.data_pipeline.datasets.labels import Labels, encode_labels, read_labels, require_labels, write_labels
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.packed import require_unique, write_pack
from cosa_fast.data_pipeline.datasets.voc import LISTS, ONEHOT_NAME, read_annotations
from cosa_fast.errors import UserError

SOURCES = ("masks", "xml", "npy", "coco")


def prepare(
    format: str, root: Path, split: str, *, source: str | None = None, given: Path | None = None, workers: int = 0
) -> tuple[ImageDataset, Labels]:
    """The split and its labels, after every image has been decoded.

    source: one of SOURCES, None to take what is there. given: a label file to take the labels from.
    UserError: what `open_dataset` refuses, a source that is not there, images without a label; or bad images, each
    first named on stderr.
    """
    dataset = open_dataset(format, root, split, need_labels=False, labels=given)
    source = "file" if given and source in (None, "npy") else source or find_source(format, root, dataset)
    findings = list(inspect(dataset, masks=source == "masks", workers=workers))
    _refuse_bad(findings)
    labels = labels_of(findings) if source == "masks" else collect(source, root, split, dataset, given)
    require_labels(encode_labels(labels, dataset.ids, dataset.classes, source), dataset.ids, source)
    return dataset, {id: labels[id] for id in dataset.ids}


def find_source(format: str, root: Path, dataset: ImageDataset) -> str:
    """What there is to take labels from: COCO instances, VOC annotations, the one-hot file, else the masks. UserError
    if nothing.
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


def collect(source: str, root: Path, split: str, dataset: ImageDataset, given: Path | None) -> Labels:
    """The labels from annotations of their own. UserError if `source` is not there."""
    if source == "file" and given is not None:
        return read_labels(given, dataset.classes)
    if source == "coco":
        return read_instances(instances_path(root, split)).labels
    if source == "xml":
        return read_annotations(root, dataset.ids)
    onehot = _onehot(root)
    if onehot is None:
        raise UserError(f"{root}: no {ONEHOT_NAME} there or in {LISTS}; give --labels FILE")
    return read_labels(onehot, dataset.classes)


def write_merged(output: Path, labels: Labels) -> int:
    """Write the label file, keeping the entries of other splits that are in it already; returns how many those are."""
    others = read_labels(output, None) if output.is_file() else {}
    kept = {id: names for id, names in others.items() if id not in labels}
    write_labels(output, {**kept, **labels})
    return len(kept)


def pack(dataset: ImageDataset, split: str, path: Path) -> str:
    """Write the image files, unchanged, into one tar in the order of the split; returns what to tell the user.
    UserError: an id that is listed twice, a file that cannot be read, or the tar not written.
    """
    require_unique(dataset.ids, split)
    names = (f"{id}{dataset.image_path(index).suffix}" for index, id in enumerate(dataset.ids))
    size = write_pack(path, ((name, dataset.encoded(index)) for index, name in enumerate(names)))
    return f"{path}: {len(dataset)} images of {split}, {size / 2**20:.1f} MiB; train with data.pack={path}"


def report(dataset: ImageDataset, labels: Labels) -> str:
    """Images per class, and totals, as text."""
    counts = Counter(name for names in labels.values() for name in names)
    width = max(len(name) for name in dataset.classes)
    lines = [f"{name:<{width}}  {counts[name]:>7}" for name in dataset.classes]
    empty = sum(not names for names in labels.values())
    lines.append(f"{len(labels)} images, {counts.total()} labels, {empty} images with none of the classes")
    return "\n".join(lines)


def _refuse_bad(findings: list[Finding]) -> None:
    problems = [finding.problem for finding in findings if finding.problem]
    for problem in problems:
        print(f"bad: {problem}", file=sys.stderr)
    if problems:
        raise UserError(
            f"{len(problems)} of {len(findings)} images are bad (listed above), no label file written; "
            "replace them or take them off the list, and run again"
        )


def _onehot(root: Path) -> Path | None:
    return next((path for path in (root / LISTS / ONEHOT_NAME, root / ONEHOT_NAME) if path.is_file()), None)
