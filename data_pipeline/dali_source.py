"""What goes into the DALI graph: encoded images and the parameters of their views, prepared ahead by threads."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from cosa_fast.data_pipeline.augment import COLOUR_OPERATIONS, AugmentConfig, AugmentParameters, Box, draw
from cosa_fast.data_pipeline.base import ImageDataset
from cosa_fast.data_pipeline.dali_operations import blur_kernel, sharpness_kernel
from cosa_fast.data_pipeline.images import lossless, plain_jpeg_size, read_image
from cosa_fast.data_pipeline.pixels import (
    enhancement,
    posterize_bits,
    render_mask,
    solarize_threshold,
    source_rectangle,
)
from cosa_fast.data_pipeline.stream import Positions, Unreadable, read_at
from cosa_fast.errors import UserError


@dataclass
class Sample:
    """One image on its way through the graph. encoded: (n,) uint8, the content of a file. size: (height, width)."""

    index: int
    id: str
    encoded: np.ndarray
    size: tuple[int, int]
    parameters: AugmentParameters
    labels: Tensor
    truth: Tensor | None
    problems: list[str]


@dataclass(frozen=True)
class Samples:
    """Sample position -> Sample.

    DALI is given the files that it reads exactly as PIL does. Everything else (other formats, other colour spaces,
    images to be turned, and those in `by_pil`) is read by PIL and handed over without loss.
    """

    dataset: ImageDataset
    config: AugmentConfig
    seed: int
    with_truth: bool
    unreadable: Unreadable
    by_pil: set[int]

    def at(self, position: int) -> Sample:
        """UserError as in `read_at`, and for a missing label or mask."""
        index, (data, size), problems = read_at(self.seed, position, len(self.dataset), self.unreadable, self._encoded)
        parameters = draw(self.seed, position, size, self.config)
        truth = render_mask(self.dataset.mask(index), parameters, self.config) if self.with_truth else None
        return Sample(
            index=index,
            id=self.dataset.ids[index],
            encoded=np.frombuffer(data, np.uint8),
            size=size,
            parameters=parameters,
            labels=torch.from_numpy(self.dataset.labels(index)),
            truth=truth,
            problems=problems,
        )

    def _encoded(self, index: int) -> tuple[bytes, tuple[int, int]]:
        path, data = self.dataset.image_path(index), self.dataset.encoded(index)
        size = plain_jpeg_size(path, data)
        if size is not None and index not in self.by_pil:
            return data, size
        image = read_image(path, data)
        return lossless(image), (image.height, image.width)


class Source:
    """The external source of the graph: called once for each batch.

    `pending` holds the samples of the batches that the graph has not handed out yet. Where a sample cannot be had, the
    source ends and leaves the UserError in `failure`, to be raised when the batches before have been used.
    """

    def __init__(self, samples: Samples, positions: Positions, threads: int, prefetch: int) -> None:
        self._samples = samples
        self._batches = iter(positions)
        self._pool = ThreadPoolExecutor(threads, "cosa_fast data")
        self._ahead: deque[list[Future[Sample]]] = deque()
        self._prefetch = prefetch
        self.pending: deque[list[Sample]] = deque()
        self.failure: UserError | None = None

    def __call__(self) -> tuple[list[np.ndarray] | np.ndarray, ...]:
        """The inputs of the graph, as `arguments` orders them, for the next batch."""
        for positions in islice(self._batches, self._prefetch + 1 - len(self._ahead)):
            self._ahead.append([self._pool.submit(self._samples.at, position) for position in positions])
        try:
            batch = [future.result() for future in self._ahead.popleft()]
        except UserError as error:
            self.failure = error
            raise StopIteration from None
        self.pending.append(batch)
        return arguments(batch, self._samples.config.crop_size)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def arguments(batch: list[Sample], crop_size: int) -> tuple[list[np.ndarray] | np.ndarray, ...]:
    """(encoded, start, end, size, blurred, row, column, operation, factor, threshold, bits, kernel, position): the
    inputs of the graph in the order of its parameters, each a list or array with one entry per image.
    """
    drawn = [sample.parameters for sample in batch]
    starts, ends = zip(*(_corners(sample.size, sample.parameters) for sample in batch), strict=True)
    kernels = [blur_kernel(p.blur_radius) for p in drawn]
    return (
        [sample.encoded for sample in batch],
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
