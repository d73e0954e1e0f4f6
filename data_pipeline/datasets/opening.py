"""Opening a data set by the name of its format."""

from collections.abc import Sequence
from pathlib import Path

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.coco import open_coco
from cosa_fast.data_pipeline.datasets.folder import open_folder
from cosa_fast.data_pipeline.datasets.packed import Pack, packing_command, require_packed
from cosa_fast.data_pipeline.datasets.synthetic import open_synthetic
from cosa_fast.data_pipeline.datasets.voc import open_voc
from cosa_fast.errors import UserError, hint

__all__ = ["FORMATS", "ImageDataset", "open_dataset"]

_OPENERS = {"voc": open_voc, "coco": open_coco, "folder": open_folder, "synthetic": open_synthetic}
FORMATS = tuple(_OPENERS)


def open_dataset(
    format: str,
    root: str | Path,
    split: str,
    *,
    labels: str | Path | None = None,
    classes: Sequence[str] | None = None,
    need_labels: bool = True,
    pack: str | Path | None = None,
) -> ImageDataset:
    """Open one split.

    voc: the VOC2012 devkit folder. coco: ROOT/annotations/instances_SPLIT.json and ROOT/SPLIT. folder: images with a
    label file. synthetic: the demo's
    images, generated into ROOT if it is empty.
    labels: a label file (see `labels.py`) in place of the format's own. classes: the foreground names in place of the
    format's own.
    need_labels: every image must have an image label; otherwise labels are attached where there are some.
    pack: the split's images in one file (see `packed.py`); the image files themselves need not be there then.
    UserError, one line: root or split missing, empty list, a listed image missing, no label for an image, an unknown
    class, a pack of other images or a damaged one.
    """
    root = Path(root).expanduser()
    label_file = Path(labels).expanduser() if labels is not None else None
    if format not in _OPENERS:
        raise UserError(f"data.format is {format!r}{hint(format, FORMATS)}; wanted one of {', '.join(FORMATS)}")
    packed = Pack(Path(pack).expanduser()) if pack is not None else None
    dataset = _OPENERS[format](root, split, labels=label_file, classes=classes, need_labels=need_labels, pack=packed)
    if packed is not None:
        require_packed(packed, dataset.ids, packing_command(format, root, split))
        dataset.read_from(packed)
    return dataset
