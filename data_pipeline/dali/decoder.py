"""Whole images through DALI, for evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from torch import Tensor

from cosa_fast.data_pipeline.dali.feed import File, Source, decoded_by_pil, device_id, images_of, read_file, run_graph
from cosa_fast.data_pipeline.datasets.base import ImageDataset


@dataclass(frozen=True)
class _Item:
    file: File
    mask: np.ndarray


def decoded_by_dali(
    dataset: ImageDataset, batches: Sequence[list[int]], device: torch.device, threads: int, prefetch: int
) -> Iterator[tuple[Tensor, list[np.ndarray]]]:
    """((N, H, W, 3) uint8 on `device`, N masks) of each batch of indices, whose images are of one size."""
    by_pil = decoded_by_pil(device)

    def load(index: int) -> _Item:
        file = read_file(dataset, index, by_pil)
        return _Item(file, dataset.truth(index, file.size))

    def open_source(used: int) -> Source[_Item]:
        return Source(load, batches[used:], lambda items: [item.file.content for item in items], threads, prefetch)

    def build(source: Source[_Item]) -> Any:
        def graph() -> Any:
            return images_of(fn.external_source(source=source, batch=True), gpu=device.type == "cuda")

        return pipeline_def(
            batch_size=max(map(len, batches), default=1),
            num_threads=threads,
            device_id=device_id(device),
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,
        )(graph)()

    for (items,), (images,) in run_graph(open_source, build, device, by_pil):
        yield torch.stack([torch.from_dlpack(image) for image in images]), [item.mask for item in items]
