"""Images at their own size with their masks, read ahead: what evaluation goes through."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cosa_fast.data_pipeline.ahead import Ahead
from cosa_fast.data_pipeline.batch import sent
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
# Images at once on a GPU, and how large each may be if there are to be that many: memory does not grow with the images.
GPU_BATCH = 16
ORDINARY_PIXELS = 640 * 640


class Shown(NamedTuple):
    """Up to N images of one size, tensors on the device of the evaluation but for `present`.

    indices: of the images in their set. images: (N, 3, H, W) float32, normalised. truths: (N, H, W) uint8 in
    {0..C, 255} (int16, see `ignored`); without masks all ignored. present: (N, C) bool on the CPU, the classes in each
    truth.
    """

    indices: list[int]
    images: Tensor
    truths: Tensor
    present: Tensor


def evaluation_stream(
    dataset: ImageDataset,
    indices: Sequence[int],
    batch_size: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    loading: Loading,
) -> Iterator[Shown]:
    """The images at `indices`, normalised, with their masks: up to `batch_size` of one size at a time, fewer if they
    are larger than ORDINARY_PIXELS. batch_size None: GPU_BATCH on a GPU, 1 elsewhere. On a GPU nothing waits for it.

    batch_size 1: in the order of `indices`, and each file is read once. Else ordered by size, for which the head of
    each image file is read before. UserError for an image or mask that is missing or unreadable; everything before it
    has been yielded by then.
    """
    if batch_size is None:
        batch_size = GPU_BATCH if device.type == "cuda" else 1
    batches = [[index] for index in indices]
    if batch_size > 1:
        batches = _of_one_size(dataset, indices, batch_size, loading.threads)
    if loading.pipeline == "dali":
        from cosa_fast.data_pipeline.dali.decoder import decoded_by_dali

        decoded = decoded_by_dali(dataset, batches, device, loading.threads, loading.prefetch)
    else:
        decoded = _decoded_by_pil(dataset, batches, device, loading)
    for batch, (pixels, masks) in zip(batches, decoded, strict=True):
        present = torch.from_numpy(np.stack([_classes_in(mask, len(dataset.classes)) for mask in masks]))
        truths = sent(torch.from_numpy(np.stack(masks)), device)
        yield Shown(batch, normalise_pixels(pixels, mean, std), truths, present)


def _classes_in(mask: np.ndarray, classes: int) -> np.ndarray:
    """(C,) bool: the classes that a mask shows."""
    unsigned = mask.view(f"u{mask.itemsize}")
    shown = np.zeros(1 << 8 * mask.itemsize, bool)
    shown[unsigned] = True
    return shown[1 : classes + 1]


def _decoded_by_pil(
    dataset: ImageDataset, batches: Sequence[list[int]], device: torch.device, loading: Loading
) -> Iterator[tuple[Tensor, list[np.ndarray]]]:
    """((N, H, W, 3) uint8 on `device`, N masks) of each batch."""

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        image = np.array(dataset.image(index))
        return image, dataset.truth(index, (image.shape[0], image.shape[1]))

    with closing(Ahead(load, batches, loading.threads, loading.prefetch)) as ahead:
        for items in ahead:
            pixels = torch.from_numpy(np.stack([image for image, _ in items]))
            yield sent(pixels, device), [mask for _, mask in items]


def _of_one_size(dataset: ImageDataset, indices: Sequence[int], batch_size: int, threads: int) -> list[list[int]]:
    """Batches of indices whose images are equally large."""
    by_size: dict[tuple[int, int], list[int]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for index, size in zip(indices, pool.map(dataset.size, indices), strict=True):
            by_size.setdefault(size, []).append(index)
    batches = []
    for (height, width), same in sorted(by_size.items()):
        count = max(1, min(batch_size, batch_size * ORDINARY_PIXELS // (height * width)))
        batches += [same[start : start + count] for start in range(0, len(same), count)]
    return batches
