"""Opening a data set by the name of its format: the format says where things are (`layout.py`), the rest is the same
for all."""

from collections.abc import Callable, Sequence
from pathlib import Path

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.coco import find_coco
from cosa_fast.data_pipeline.datasets.folder import find_folder
from cosa_fast.data_pipeline.datasets.labels import (
    ImageNames,
    Labels,
    Say,
    class_names,
    describe_classes,
    encode_labels,
    read_labels,
    require_labels,
)
from cosa_fast.data_pipeline.datasets.layout import Layout, require_files
from cosa_fast.data_pipeline.datasets.packed import Pack, packing_command, require_packed
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
    labels: a label file (see `labels.py`) in place of the format's own. classes: the foreground names in place of the
    format's own. need_labels: every image must have an image label; otherwise labels are attached where there are some.
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
    source, content = _labels(layout, given, say)
    if content is None and need_labels:
        command = f"python -m cosa_fast.prepare --format {format} --root {root} --split {split}"
        raise UserError(f"no image labels: looked for {source}; give data.labels=FILE or build one with: {command}")
    content = content or {}
    names = layout.classes or class_names(root, classes, sorted({name for row in content.values() for name in row}))
    table = encode_labels(content, layout.ids, names, source)
    if need_labels:
        require_labels(table, layout.ids, source)
        if say is not None:
            say(f"{split}: {counted(len(layout.ids), 'image')}, labels from {source}: {describe_classes(table, names)}")
    dataset = layout.dataset(names, layout.ids, layout.images, table, layout.masks.files)
    dataset.masks_absent = layout.masks.absent
    dataset.label_source = source
    dataset.notes = layout.notes
    if packed is not None:
        require_packed(packed, dataset.ids, packing_command(format, root, split))
        dataset.read_from(packed)
    return dataset


def _labels(layout: Layout, given: Path | None, say: Say | None) -> tuple[str, Labels | None]:
    """(where they come from, labels) of the given file, else of the format's label files or annotations; (where they
    were looked for, None) if there are none.
    """
    path = given or next((path for path in layout.label_files if path.is_file()), None)
    if path is not None:
        images = ImageNames(layout.everything or layout.ids, complete=layout.everything is not None)
        return str(path), read_labels(path, layout.classes, images, say)
    places = list(layout.label_files)
    if layout.annotations is not None:
        place, read = layout.annotations
        if place.exists():
            return str(place), read()
        places.append(place)
    return ", ".join(map(str, places)), None
