"""Segmentations of any images by a checkpoint's network, and which images those are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES, read_image
from cosa_fast.data_pipeline.views.pixels import normalise
from cosa_fast.device import compute_type, pick_device
from cosa_fast.errors import UserError
from cosa_fast.evaluation.evaluator import class_indices
from cosa_fast.evaluation.inference import allowed_classes, segment
from cosa_fast.evaluation.networks import Networks

MAX_SIDE = 1024


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
        raise UserError(f"no images in {', '.join(map(str, places))}; wanted: {', '.join(IMAGE_SUFFIXES)}")
    return [Source(path.stem, path, lambda path=path: read_image(path)) for path in paths]  # type: ignore[misc]


def split_sources(dataset: ImageDataset) -> list[Source]:
    """The images of a data set's split, with their labels where there are some."""
    return [
        Source(
            name,
            dataset.image_path(index),
            lambda index=index: dataset.image(index),  # type: ignore[misc]
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


class Segmenter:
    """Segments images of any size with one network of a checkpoint, on the device of its configuration.

    network: "on" or "an". scales: None means those of the evaluation. labels: the class names that may appear besides
    background (label-aware); None allows all (label-free). max_side: longer images are shrunk to it for the network;
    their segmentations keep their size. Raises UserError for an unknown class name.
    """

    def __init__(
        self,
        networks: Networks,
        *,
        network: str = "an",
        scales: Sequence[float] | None = None,
        labels: Sequence[str] | None = None,
        max_side: int = MAX_SIDE,
    ) -> None:
        config = networks.config
        self._device = pick_device(config.run.device)
        self._network = networks.named(network).to(self._device)
        self._config = config
        self._scales = scales or config.eval.scales
        self._max_side = max_side
        self._allowed = None
        if labels is not None:
            present = named_classes(labels, networks.classes).to(self._device)
            self._allowed = allowed_classes(present, len(networks.classes) + 1)

    def segment(self, image: Image.Image) -> np.ndarray:
        """(H, W) uint8 in 0..C, the classes of an RGB image's pixels, 0 for background."""
        data = self._config.data
        return segment(
            self._network,
            normalise(shrunk(image, self._max_side), data.mean, data.std).to(self._device),
            (image.height, image.width),
            self._scales,
            flip=self._config.eval.flip,
            allowed=self._allowed,
            dtype=compute_type(self._config.run.precision, self._device),
        ).numpy()


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
        return sorted(path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not place.exists():
        raise UserError(f"{place}: no such file or folder")
    return [place]


def _identity(path: Path) -> tuple[int, int]:
    """The same for two names (links, other spellings) of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino
