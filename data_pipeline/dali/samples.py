"""What goes into the DALI graph of the training pipeline: encoded images and the parameters of their views."""

from dataclasses import dataclass

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

INPUTS = 13  # that `arguments` gives


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
        """UserError as in `read_at`, and for a missing label or mask."""
        index, file, problems = read_at(
            self.seed,
            position,
            len(self.dataset),
            self.unreadable,
            lambda index: read_file(self.dataset, index, self.by_pil),
        )
        parameters = draw(self.seed, position, file.size, self.config)
        truth = render_mask(self.dataset.mask(index, file.size), parameters, self.config) if self.with_truth else None
        return Sample(
            file=file,
            id=self.dataset.ids[index],
            parameters=parameters,
            labels=torch.from_numpy(self.dataset.labels(index)),
            truth=truth,
            problems=problems,
        )


def arguments(batch: list[Sample], crop_size: int) -> tuple[list[np.ndarray] | np.ndarray, ...]:
    """(content, start, end, size, blurred, row, column, operation, factor, threshold, bits, kernel, position): the
    inputs of the graph in the order of its parameters, each a list or array with one entry per image.
    """
    drawn = [sample.parameters for sample in batch]
    starts, ends = zip(*(_corners(sample.file.size, sample.parameters) for sample in batch), strict=True)
    kernels = [blur_kernel(p.blur_radius) for p in drawn]
    return (
        [sample.file.content for sample in batch],
        np.array(starts, np.float32),
        np.array(ends, np.float32),
        np.array([(p.region.height, p.region.width) for p in drawn], np.float32),
        np.array([p.blur_radius > 0 for p in drawn]),
        [kernel[None, :] for kernel in kernels],
        [kernel[:, None] for kernel in kernels],
        np.array([COLOUR_OPERATIONS.index(p.operation) for p in drawn], np.int32),
        np.array([enhancement(p.magnitude) for p in drawn], np.float32),
        np.array([solarize_threshold(p.magnitude) for p in drawn], np.uint8),
        np.array([256 - 2 ** (8 - posterize_bits(p.magnitude)) for p in drawn], np.uint8),
        np.stack([sharpness_kernel(enhancement(p.magnitude)) for p in drawn]),
        np.array([_position(p.box, crop_size) for p in drawn], np.float32),
    )


def _corners(size: tuple[int, int], parameters: AugmentParameters) -> tuple[tuple[float, float], tuple[float, float]]:
    """Start and end of the source rectangle, (y, x) each; from right to left where the view is mirrored."""
    top, left, bottom, right = source_rectangle(size, parameters)
    return ((top, right), (bottom, left)) if parameters.flip else ((top, left), (bottom, right))


def _position(box: Box, crop_size: int) -> tuple[float, float]:
    """Where `box` starts, as a share of the padding."""
    return box.top / max(1, crop_size - box.height), box.left / max(1, crop_size - box.width)
