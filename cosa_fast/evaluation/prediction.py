"""Which images are to be predicted, and which classes a user names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES, read_image
from cosa_fast.errors import UserError
from cosa_fast.evaluation.evaluator import class_indices
from cosa_fast.files import nearest

MAX_SIDE = 1024
# Of what is in folders below one without images.
_LOOKED_AT = 10_000


@dataclass(frozen=True)
class Source:
    """One image to predict. name: of what is made of it. path: its file, in a pack PACK/NAME. read: the image, RGB and
    upright. present: (P,) int64 in 0..C-1, its true classes; None where they are not known."""

    name: str
    path: Path
    read: Callable[[], Image.Image]
    present: Tensor | None = None


def file_sources(places: Sequence[Path]) -> list[Source]:
    """The images that files and folders name (a folder: its own image files, in order of their names), each once.
    UserError: no image, a missing place."""
    paths = list({path.absolute(): path for place in places for path in _images(place)}.values())
    if not paths:
        below = (path for place in places for path in islice(place.rglob("*"), _LOOKED_AT))
        found = min(filter(_is_image, below), key=lambda path: (path.suffix == ".png", path), default=None)
        remedy = f"they end in {', '.join(IMAGE_SUFFIXES)}"
        if found is not None:  # masks, which are there as well, are .png
            remedy = f"those in folders below it are taken if these are named, for example {found.parent}"
        raise UserError(f"no images in {', '.join(map(str, places))}; {remedy}")
    return [Source(path.stem, path, partial(read_image, path)) for path in paths]


def split_sources(dataset: ImageDataset) -> list[Source]:
    """The images of a data set's split, with their labels where there are some."""
    return [
        Source(
            name,
            dataset.image_path(index),
            partial(dataset.image, index),
            torch.from_numpy(dataset.labels(index)).nonzero()[:, 0] if dataset.has_label(index) else None,
        )
        for index, name in enumerate(dataset.ids)
    ]


def require_free(sources: Sequence[Source], outputs: Callable[[Source], Sequence[Path]]) -> None:
    """UserError for two images with one output, and for an output that would replace an input."""
    inputs = {_identity(source.path) for source in sources if source.path.exists()}
    makers: dict[Path, Source] = {}
    for source in sources:
        for output in outputs(source):
            if output.exists() and _identity(output) in inputs:
                raise UserError(f"{output} is an input and would be overwritten; choose another folder with -o")
            if output in makers:
                raise UserError(
                    f"{makers[output].path} and {source.path} would both be written to {output}; "
                    "predict them into two folders"
                )
            makers[output] = source


def named_classes(labels: Sequence[str], classes: Sequence[str]) -> Tensor:
    """(P,) int64 in 0..C-1. UserError for a name that is no class."""
    return torch.tensor(class_indices(labels, classes, "--labels"), dtype=torch.int64) - 1


def shrunk(image: Image.Image, max_side: int) -> Image.Image:
    """The image, its longer side at most `max_side`."""
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR)


def _images(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(filter(_is_image, place.iterdir()))
    if not place.exists():
        raise UserError(f"{place}: no such file or folder{nearest(place)}; give image files, or folders of them")
    return [place]


def _is_image(path: Path) -> bool:
    """Hidden files are none: archives of macOS bring a ._x.jpg for each x.jpg."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and path.is_file()


def _identity(path: Path) -> tuple[int, int]:
    """The same for two names (links, other spellings) of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino
