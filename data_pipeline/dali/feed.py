"""Files into DALI graphs, batches out of them: which files DALI is given, and what happens at one it cannot decode.

Without a GPU PIL decodes everything, in the threads that read the files. DALI's CPU decoder is no faster (both are
libjpeg-turbo), and that of DALI 2.4 crashes the process where one of several images of a run cannot be decoded.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from cosa_fast.data_pipeline.ahead import Ahead
from cosa_fast.data_pipeline.dali.operations import decode
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.images import lossless, plain_jpeg_size, read_image
from cosa_fast.errors import UserError


@dataclass(frozen=True)
class File:
    """What DALI is given of the image with number `index`. content: the file, (n,) uint8, or the pixels,
    (height, width, 3) uint8. size: (height, width).
    """

    index: int
    content: np.ndarray
    size: tuple[int, int]


class HasFile(Protocol):
    """Something that comes with a file."""

    @property
    def file(self) -> File: ...


Item = TypeVar("Item", bound=HasFile)


def check_device(device: torch.device) -> None:
    """RuntimeError where DALI cannot work on `device`."""

    def graph() -> Any:
        number = types.Constant([0], device="cpu")
        return number.gpu() if device.type == "cuda" else number

    pipeline_def(batch_size=1, num_threads=1, device_id=device_id(device))(graph)().run()


def device_id(device: torch.device) -> int | None:
    """DALI's number of a GPU; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def decoded_by_pil(device: torch.device) -> set[int] | None:
    """The images that PIL decodes: none to begin with, None for all of them."""
    return set() if device.type == "cuda" else None


def read_file(dataset: ImageDataset, index: int, by_pil: set[int] | None) -> File:
    """The image's own file where DALI decodes that exactly as PIL does. Else, and for an image in `by_pil`, what PIL
    reads of it, as a file without loss; where `by_pil` is None, as pixels. UserError as in `read_image`.
    """
    path, data = dataset.image_path(index), dataset.encoded(index)
    if by_pil is None:
        pixels = np.array(read_image(path, data))
        return File(index, pixels, (pixels.shape[0], pixels.shape[1]))
    size = plain_jpeg_size(path, data)
    if size is None or index in by_pil:
        image = read_image(path, data)
        data, size = lossless(image), (image.height, image.width)
    return File(index, np.frombuffer(data, np.uint8), size)


def images_of(content: Any, gpu: bool) -> Any:
    """In a graph, the images: decoded on a GPU; on the CPU `content` is their pixels already."""
    return decode(content, gpu) if gpu else fn.reshape(content, layout="HWC")


class Source(Generic[Item]):
    """The external source of a graph, called once for each of its runs: it loads items and makes them the graph's
    inputs.

    A run takes up to `group` batches at once, because DALI's threads share out the images of one run, and keep busy
    only if these are many. `pending` holds the batches of the runs that the graph has not handed out yet. Where an item
    cannot be loaded, the source ends and leaves the UserError in `failure`, to be raised when the batches before have
    been used.
    """

    def __init__(
        self,
        load: Callable[[int], Item],
        batches: Iterable[list[int]],
        inputs: Callable[[list[Item]], Any],
        threads: int,
        prefetch: int,
        group: int = 1,
    ) -> None:
        self._ahead = Ahead(load, batches, threads, prefetch * group)
        self._inputs = inputs
        self._group = group
        self.pending: deque[list[list[Item]]] = deque()
        self.failure: UserError | None = None

    def __call__(self) -> Any:
        batches = list(islice(self._loaded(), self._group))
        if not batches:
            raise StopIteration
        self.pending.append(batches)
        return self._inputs([item for batch in batches for item in batch])

    def _loaded(self) -> Iterator[list[Item]]:
        while self.failure is None:
            try:
                yield next(self._ahead)
            except StopIteration:
                return
            except UserError as error:
                self.failure = error

    def close(self) -> None:
        """End the threads."""
        self._ahead.close()


def run_graph(
    open_source: Callable[[int], Source[Item]],
    build: Callable[[Source[Item]], Any],
    device: torch.device,
    by_pil: set[int] | None,
) -> Iterator[tuple[list[list[Item]], tuple[Any, ...]]]:
    """(batches, outputs of the graph) of each run, until the source ends.

    open_source(n): the source from the n-th batch on. build: its pipeline. by_pil: as in `read_file`. Where DALI fails
    at images that it cannot decode, they are added to `by_pil`, and a new pipeline goes on with that very run: PIL then
    reads them, or its UserError says what is wrong. Any other error of DALI is raised.
    """
    used = 0
    while True:
        source = open_source(used)
        try:
            pipeline = build(source)
            while True:
                try:
                    outputs = pipeline.run(_stream(device))
                except StopIteration:
                    if source.failure is not None:
                        raise source.failure from None
                    return
                except RuntimeError:
                    if by_pil is None:
                        raise
                    waiting = [item for run in source.pending for batch in run for item in batch]
                    bad = {item.file.index for item in waiting if not _decodes(item, device)}
                    if not bad:
                        raise
                    by_pil |= bad
                    break
                batches = source.pending.popleft()
                used += len(batches)
                yield batches, outputs
        finally:
            source.close()


def _stream(device: torch.device) -> Any:
    """The CUDA stream on which the outputs will be used; None on the CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _decodes(item: HasFile, device: torch.device) -> bool:
    """Whether DALI makes an image of the right size of the item's file."""

    def graph() -> Any:
        file = fn.external_source(source=lambda: [item.file.content], batch=True)
        return decode(file, gpu=device.type == "cuda")

    pipeline = pipeline_def(batch_size=1, num_threads=1, device_id=device_id(device), prefetch_queue_depth=1)(graph)()
    try:
        (image,) = pipeline.run()
    except RuntimeError:
        return False
    return tuple(image.shape()[0]) == (*item.file.size, 3)
