"""Images at their own size with their masks, read ahead: what evaluation goes through."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cosa_fast.data_pipeline.ahead import Ahead
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.views.pixels import normalise_pixels


@dataclass(frozen=True)
class Loading:
    """How images are read. pipeline: DALI or PIL ("torch") decodes them. threads: so many read and decode. prefetch: so
    many batches are read ahead.
    """

    pipeline: Literal["dali", "torch"] = "torch"
    threads: int = 1
    prefetch: int = 2


BY_PIL = Loading()


def evaluation_stream(
    dataset: ImageDataset,
    indices: Sequence[int],
    batch_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    loading: Loading,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(N of `indices`; images (N, 3, H, W) float32, normalised; truths (N, H, W) uint8 in {0..C, 255}), tensors on
    `device`: up to `batch_size` images of one size at a time. Without masks all truths are 255.

    batch_size 1: in the order of `indices`, and each file is read once. Else ordered by size, for which the head of
    each image file is read before. UserError for an image or mask that is missing or unreadable; everything before it
    has been yielded by then.
    """
    batches = [[index] for index in indices]
    if batch_size > 1:
        batches = _of_one_size(dataset, indices, batch_size, loading.threads)
    if loading.pipeline == "dali":
        from cosa_fast.data_pipeline.dali.decoder import decoded_by_dali

        decoded = decoded_by_dali(dataset, batches, device, loading.threads, loading.prefetch)
    else:
        decoded = _decoded_by_pil(dataset, batches, device, loading)
    for batch, (pixels, masks) in zip(batches, decoded, strict=True):
        yield batch, normalise_pixels(pixels, mean, std), torch.from_numpy(np.stack(masks)).to(device)


def _decoded_by_pil(
    dataset: ImageDataset, batches: Sequence[list[int]], device: torch.device, loading: Loading
) -> Iterator[tuple[Tensor, list[np.ndarray]]]:
    """((N, H, W, 3) uint8 on `device`, N masks) of each batch."""

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        image = np.array(dataset.image(index))
        return image, dataset.truth(index, (image.shape[0], image.shape[1]))

    with closing(Ahead(load, batches, loading.threads, loading.prefetch)) as ahead:
        for items in ahead:
            yield torch.from_numpy(np.stack([image for image, _ in items])).to(device), [mask for _, mask in items]


def _of_one_size(dataset: ImageDataset, indices: Sequence[int], batch_size: int, threads: int) -> list[list[int]]:
    """Batches of indices whose images are equally large."""
    by_size: dict[tuple[int, int], list[int]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for index, size in zip(indices, pool.map(dataset.size, indices), strict=True):
            by_size.setdefault(size, []).append(index)
    return [
        same[start : start + batch_size]
        for _, same in sorted(by_size.items())
        for start in range(0, len(same), batch_size)
    ]
