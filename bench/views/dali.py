"""DALI's decoder alone, for bench/data.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def

from cosa_fast.data_pipeline.dali.operations import decode
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.views.parameters import image_index


def decoding_stream(
    dataset: ImageDataset, batch_size: int, seed: int, threads: int, device: torch.device
) -> Iterator[Any]:
    """Endless batches of decoded images, in the order in which training shows them; pixels stay with DALI."""
    positions = count()

    def encoded() -> list[np.ndarray]:
        indices = [image_index(seed, next(positions), len(dataset)) for _ in range(batch_size)]
        return [np.frombuffer(dataset.encoded(index), np.uint8) for index in indices]

    def graph() -> Any:
        return decode(fn.external_source(source=encoded, batch=True), device.type == "cuda")

    gpu = torch.cuda.current_device() if device.type == "cuda" else None
    pipeline = pipeline_def(batch_size=batch_size, num_threads=threads, device_id=gpu, exec_dynamic=True)(graph)()
    pipeline.build()
    while True:
        yield pipeline.run()
