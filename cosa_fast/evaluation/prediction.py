"""Segmentations of any images by a checkpoint's network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES
from cosa_fast.data_pipeline.views.pixels import normalise
from cosa_fast.device import compute_type, pick_device
from cosa_fast.errors import UserError
from cosa_fast.evaluation.evaluator import class_indices
from cosa_fast.evaluation.inference import allowed_classes, class_probabilities, forward_scales, inference, segment
from cosa_fast.evaluation.networks import Networks

MAX_SIDE = 1024


@dataclass(frozen=True)
class Job:
    """One image and the two files to be made from it."""

    image: Path
    mask: Path
    overlay: Path


def plan(sources: Sequence[Path], directory: Path) -> list[Job]:
    """The images that files and folders name (a folder: its own image files, in order of their names), each once.

    UserError: no image, a missing source, two images with one result, a result that would replace an input.
    """
    images = list({path.absolute(): path for source in sources for path in _images(source)}.values())
    if not images:
        raise UserError(f"no images in {', '.join(map(str, sources))}; wanted: {', '.join(IMAGE_SUFFIXES)}")
    jobs = [Job(path, directory / f"{path.stem}.png", directory / f"{path.stem}_overlay.jpg") for path in images]
    inputs = {_identity(path) for path in images}
    makers: dict[Path, Path] = {}
    for job in jobs:
        for output in (job.mask, job.overlay):
            if output.exists() and _identity(output) in inputs:
                raise UserError(f"{output} is an input and would be overwritten; choose another folder with -o")
            if output in makers:
                raise UserError(
                    f"{makers[output]} and {job.image} would both be written to {output}; predict them into two folders"
                )
            makers[output] = job.image
    return jobs


class Segmenter:
    """Segments images of any size with one network of a checkpoint, on the `device` of its configuration.

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
        self.device = pick_device(config.run.device)
        self.pixel_type = np.uint8 if len(networks.classes) <= 254 else np.int16  # of segmentations
        self._network = networks.named(network).to(self.device)
        self._config = config
        self._scales = scales or config.eval.scales
        self._max_side = max_side
        dtype = compute_type(config.run.precision, self.device)
        self._how: dict[str, Any] = {"flip": config.eval.flip, "dtype": dtype}
        self._allowed = None
        if labels is not None:
            indices = class_indices(labels, networks.classes, "--labels")
            present = torch.tensor(indices, dtype=torch.int64, device=self.device) - 1
            self._allowed = allowed_classes(present, len(networks.classes) + 1)

    def segment(self, image: Image.Image) -> np.ndarray:
        """(H, W) uint8 in 0..C (int16 for more than 254 classes): the classes of an RGB image's pixels, 0 for
        background."""
        options = {"allowed": self._allowed, **self._how}
        return segment(self._network, self._input(image), (image.height, image.width), self._scales, **options).numpy()

    def probabilities(self, image: Image.Image) -> Tensor:
        """(K, H, W) float32 on the device, background first: what `segment` takes the best of."""
        with inference(self._network):
            outputs = forward_scales(
                self._network, self._input(image)[None], self._scales, seg_scales=self._scales, **self._how
            )
        segs = [output.segmentation() for output in outputs.values()]
        return class_probabilities(segs, (image.height, image.width), self._allowed)

    def _input(self, image: Image.Image) -> Tensor:
        data = self._config.data
        return normalise(_shrink(image, self._max_side), data.mean, data.std).to(self.device)


def _images(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    return [source]


def _identity(path: Path) -> tuple[int, int]:
    """The same for two names (links, other spellings) of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _shrink(image: Image.Image, max_side: int) -> Image.Image:
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR)
