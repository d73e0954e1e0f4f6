"""Opening a data set by the name of its format: the format says where things are (`layout.py`), the rest is the same
for all."""

from collections.abc import Callable, Sequence
from pathlib import Path

from cosa_fast.data_pipeline.datasets import folder, instances, voc
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.coco import find_coco
from cosa_fast.data_pipeline.datasets.folder import find_folder
from cosa_fast.data_pipeline.datasets.labels import (
    ImageNames,
    Say,
    class_names,
    describe_classes,
    require_labels,
)
from cosa_fast.data_pipeline.datasets.layout import Layout, require_files
from cosa_fast.data_pipeline.datasets.packed import Pack, packing_command, require_packed
from cosa_fast.data_pipeline.datasets.sources import read_sources
from cosa_fast.data_pipeline.datasets.synthetic import find_synthetic
from cosa_fast.data_pipeline.datasets.voc import find_voc
from cosa_fast.errors import UserError, counted, hint

# (root, split, the names of data.classes, the pack) -> where things are.
_FINDERS: dict[str, Callable[[Path, str, Sequence[str] | None, Pack | None], Layout]] = {
    "voc": find_voc,
    "coco": find_coco,
    "folder": find_folder,
    "synthetic": find_synthetic,
}
FORMATS = tuple(_FINDERS)


def splits_of(format: str, root: Path) -> list[str]:
    """The splits of which there is something at `root`, sorted. UserError as in `devkit`."""
    match format:
        case "coco":
            return instances.splits(root)
        case "folder":
            return folder.splits(root)
        case _:
            return voc.splits(voc.devkit(root))


def open_dataset(
    format: str,
    root: str | Path,
    split: str,
    *,
    labels: str | Path | None = None,
    classes: Sequence[str] | None = None,
    need_labels: bool = True,
    pack: str | Path | None = None,
    say: Say | None = None,
) -> ImageDataset:
    """Open one split.

    format: "voc", the VOC2012 devkit folder or one above it; "coco", an instances file and its images; "folder",
    images with a label file; "synthetic", the demo's images, as `synthetic.py` generates them.
    labels: a label file (see `labels.py`) in place of all that the set has (see `sources.py`). classes: the foreground
    names in place of the format's own. need_labels: every image must have an image label; otherwise labels are attached
    where there are some.
    pack: the split's images in one file (see `packed.py`); the image files themselves need not be there then.
    say: is told where the labels come from, how the file was understood, and how often each class comes.
    UserError, one line: root or split missing, empty list, a listed image missing, no label for an image, an unknown
    class, a pack of other images or a damaged one.
    """
    root = Path(root).expanduser()
    if format not in _FINDERS:
        raise UserError(f"data.format is {format!r}{hint(format, FORMATS)}; wanted one of {', '.join(FORMATS)}")
    packed = Pack(Path(pack).expanduser()) if pack is not None else None
    layout = _FINDERS[format](root, split, classes, packed)
    if packed is None:
        require_files(layout.images, layout.listing)
    given = Path(labels).expanduser() if labels is not None else None
    if given is not None and not given.is_file() and (root / given).is_file():
        raise UserError(f"{given}: no such file (did you mean {str(root / given)!r}?); check the path")
    if say is not None:
        for note in layout.notes:
            say(f"{split}: {note}")
    known = ImageNames(layout.everything or layout.ids, layout.aliases, complete=layout.everything is not None)
    sources = read_sources(layout, given, known, say)
    if need_labels and not sources.places:
        command = f"python -m cosa_fast.prepare --format {format} --root {root} --split {split}"
        places = _looked_for(layout)
        raise UserError(f"no image labels: looked for {places}; give data.labels=FILE or build one with: {command}")
    names = layout.classes or class_names(root, classes, sources.names())
    table = sources.table(layout.ids, names)
    source = sources.in_words() or _looked_for(layout)
    if need_labels:
        require_labels(table, layout.ids, source, *sources.notes)
    if say is not None:
        for note in sources.notes:
            say(f"{split}: {note}")
        if need_labels:
            say(f"{split}: {counted(len(layout.ids), 'image')}, labels from {source}: {describe_classes(table, names)}")
    dataset = layout.dataset(names, layout.ids, layout.images, table, layout.masks.files)
    dataset.masks_absent = layout.masks.absent
    dataset.label_source, dataset.label_places, dataset.label_origins = source, sources.places, sources.origins
    dataset.known, dataset.notes = known, layout.notes + sources.notes
    if packed is not None:
        require_packed(packed, dataset.ids, packing_command(format, root, split))
        dataset.read_from(packed)
    return dataset


def _looked_for(layout: Layout) -> str:
    places = [*layout.label_files, *([layout.annotations[0]] if layout.annotations is not None else [])]
    return ", ".join(map(str, places))
