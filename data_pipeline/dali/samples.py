"""What goes into the DALI graph of the training pipeline: images and the parameters of their views."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cosa_fast.data_pipeline.dali.feed import File, read_file
from cosa_fast.data_pipeline.dali.operations import blur_kernel, sharpness_kernel
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.stream import Unreadable, read_at
from cosa_fast.data_pipeline.views.parameters import COLOUR_OPERATIONS, AugmentConfig, AugmentParameters, Box, draw
from cosa_fast.data_pipeline.views.pixels import (
    enhancement,
    posterize_bits,
    render_mask,
    solarize_threshold,
    source_rectangle,
)


@dataclass
class Sample:
    """One image on its way through the graph."""

    file: File
    id: str
    parameters: AugmentParameters
    labels: Tensor
    truth: Tensor | None
    problems: list[str]


@dataclass(frozen=True)
class Samples:
    """Sample position -> Sample. by_pil: as in `read_file`."""

    dataset: ImageDataset
    config: AugmentConfig
    seed: int
    with_truth: bool
    unreadable: Unreadable
    by_pil: set[int] | None

    def at(self, position: int) -> Sample:
        """The sample at `position`. UserError as in `read_at`, and for a missing label or mask."""
        dataset = self.dataset
        index, file, problems = read_at(
            self.seed, position, len(dataset), self.unreadable, lambda index: read_file(dataset, index, self.by_pil)
        )
        parameters = draw(self.seed, position, file.size, self.config)
        truth = render_mask(dataset.mask(index, file.size), parameters, self.config) if self.with_truth else None
        return Sample(
            file=file,
            id=dataset.ids[index],
            parameters=parameters,
            labels=torch.from_numpy(dataset.labels(index)),
            truth=truth,
            problems=problems,
        )


class Inputs(NamedTuple):
    """The inputs of the graph, in their order: of each a list or an array with one entry per image, or in the graph its
    DataNode.
    """

    content: Any  # of the file, encoded or as pixels: see `File`
    start: Any  # (y, x) float32, where the source rectangle begins
    end: Any  # (y, x) float32, where it ends; end < start mirrors
    size: Any  # (height, width) float32 of the view without padding
    blurred: Any  # bool
    row: Any  # (1, n) float32, the blur along x
    column: Any  # (n, 1) float32, the blur along y
    operation: Any  # int32, number in COLOUR_OPERATIONS
    factor: Any  # float32, of colour, contrast and brightness
    threshold: Any  # uint8, of solarize
    bits: Any  # uint8, those that posterize keeps
    kernel: Any  # (3, 3) float32, of sharpness
    position: Any  # (y, x) float32, the place in the crop as a share of the padding


def graph_inputs(batch: list[Sample], crop_size: int) -> Inputs:
    """What the samples put into the graph."""
    drawn = [sample.parameters for sample in batch]
    starts, ends = zip(*(_corners(sample.file.size, sample.parameters) for sample in batch), strict=True)
    kernels = [blur_kernel(p.blur_radius) for p in drawn]
    return Inputs(
        content=[sample.file.content for sample in batch],
        start=np.array(starts, np.float32),
        end=np.array(ends, np.float32),
        size=np.array([(p.region.height, p.region.width) for p in drawn], np.float32),
        blurred=np.array([p.blur_radius > 0 for p in drawn]),
        row=[kernel[None, :] for kernel in kernels],
        column=[kernel[:, None] for kernel in kernels],
        operation=np.array([COLOUR_OPERATIONS.index(p.operation) for p in drawn], np.int32),
        factor=np.array([enhancement(p.magnitude) for p in drawn], np.float32),
        threshold=np.array([solarize_threshold(p.magnitude) for p in drawn], np.uint8),
        bits=np.array([256 - 2 ** (8 - posterize_bits(p.magnitude)) for p in drawn], np.uint8),
        kernel=np.stack([sharpness_kernel(enhancement(p.magnitude)) for p in drawn]),
        position=np.array([_position(p.box, crop_size) for p in drawn], np.float32),
    )


def _corners(size: tuple[int, int], parameters: AugmentParameters) -> tuple[tuple[float, float], tuple[float, float]]:
    """Start and end of the source rectangle, (y, x) each; from right to left where the view is mirrored."""
    top, left, bottom, right = source_rectangle(size, parameters)
    return ((top, right), (bottom, left)) if parameters.flip else ((top, left), (bottom, right))


def _position(box: Box, crop_size: int) -> tuple[float, float]:
    """Where `box` starts, as a share of the padding."""
    return box.top / max(1, crop_size - box.height), box.left / max(1, crop_size - box.width)
