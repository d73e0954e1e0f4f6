"""Where the parts of a split are: what each format finds, and what finding them takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import Labels
from cosa_fast.data_pipeline.datasets.masks import MaskFiles
from cosa_fast.errors import UserError


@dataclass(frozen=True)
class Layout:
    """One split as a format finds it.

    ids, images: one per image, in the order of `listing`, the file or folder that lists them. classes: the foreground
    names; None where only the labels name them.
    label_files: where a label file may be; of those that are there, the first that has an image counts for it.
    annotations: (place, how to read the labels of some images there) of what counts for images that no label file has.
    masks: see MaskFiles. dataset: makes the data set of classes, ids, images, label table and mask files.
    everything: the ids of all images on the disk, those of other splits included; None where that is not known.
    aliases: other paths of these images, without suffix, with their ids. notes: what the user is to know of how things
    were found.
    """

    ids: list[str]
    images: list[Path]
    listing: Path
    classes: tuple[str, ...] | None
    label_files: tuple[Path, ...] = ()
    annotations: tuple[Path, Callable[[Sequence[str]], Labels]] | None = None
    masks: MaskFiles = field(default_factory=lambda: MaskFiles(None))
    dataset: Callable[..., ImageDataset] = ImageDataset
    everything: frozenset[str] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def file_names(folder: Path) -> set[str]:
    """The names in a folder; none if it does not exist."""
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def require_files(images: Sequence[Path], listing: Path) -> None:
    """UserError if an image that `listing` names is not there. Lists each folder once: far cheaper than a look-up per
    file on a network disk.
    """
    present = {folder: file_names(folder) for folder in {image.parent for image in images}}
    missing = [image for image in images if image.name not in present[image.parent]]
    if missing:
        raise UserError(
            f"{listing}: {len(missing)} of {len(images)} listed images are missing, first {missing[0]}; "
            "restore them or take them off the list"
        )
