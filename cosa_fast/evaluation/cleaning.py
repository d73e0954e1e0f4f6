"""Segmentations cleaned up by the CRF (crf.py), several images at a time.

"ours" sums over all pairs of pixels: for GPUs, and for small images. "pydensecrf" approximates the sums on the CPU and
is an optional extra, looked for at run time.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.errors import UserError
from cosa_fast.evaluation.crf import crf_inference

METHODS = {"ours": "exact", "pydensecrf": "lattice"}
SIGMA_XY = 67.0  # of the field's evaluations, in pixels of the image
# A class that nowhere reaches this probability cannot win a pixel, and takes no part.
LIKELY = 0.01
# Of "ours" on a CPU: filters of an image (ten iterations and a normaliser), pairs per second, and what is still waited
# for.
FILTERS = 11
PAIRS_PER_SECOND = 3e7
PATIENCE_SECONDS = 120.0

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Cleaned:
    """What the CRF made of a segmentation: labels (H, W) uint16 in 0..C, and how long it took."""

    labels: np.ndarray
    seconds: float


def check_methods(methods: Sequence[str]) -> None:
    """UserError where a package is missing that one of them needs."""
    if "pydensecrf" in methods and importlib.util.find_spec("pydensecrf") is None:
        raise UserError(
            "--crf pydensecrf: the package is not installed; pip install -c constraints.txt -e '.[crf]', or --crf ours"
        )


def likely_classes(probabilities: Tensor) -> Tensor:
    """(K',) int64, ascending: the rows of (K, H, W) probabilities that take part."""
    return (probabilities.amax((1, 2)) > LIKELY).nonzero()[:, 0]


def clean(probabilities: Tensor, classes: Tensor, image: Tensor, method: str, side: int | None = None) -> Cleaned:
    """The labels of the marginals that `method` of METHODS infers.

    probabilities: (K', H, W) float, on the device that "ours" is to run on. classes: (K',) int64, what its rows are.
    image: (3, H, W) uint8, there too. side: a longer image is shrunk to it for the CRF, with σ_xy; its marginals are
    enlarged again. UserError where "ours" would take too long on a CPU.
    """
    started = time.perf_counter()
    height, width = image.shape[1:]
    if len(classes) > 1:
        scale = min(1.0, side / max(height, width)) if side else 1.0
        if scale < 1:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            probabilities, image = _shrunk(probabilities, size), _shrunk(image, size).round().to(torch.uint8)
        if method == "ours" and image.device.type == "cpu":
            _check_patience(image.shape[1], image.shape[2])
        probabilities = crf_inference(probabilities, image, bilateral_sigma_xy=SIGMA_XY * scale, method=METHODS[method])
        if scale < 1:
            probabilities = F.interpolate(probabilities[None], size=(height, width), mode="bilinear")[0]
    labels = classes[probabilities.argmax(0)].cpu().numpy().astype(np.uint16)
    return Cleaned(labels, time.perf_counter() - started)


def _shrunk(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[None].float(), size=size, mode="bilinear", antialias=True)[0]


def _check_patience(height: int, width: int) -> None:
    seconds = FILTERS * (height * width) ** 2 / PAIRS_PER_SECOND
    if seconds > PATIENCE_SECONDS:
        side = int(max(height, width) * (PATIENCE_SECONDS / 4 / seconds) ** 0.25)
        raise UserError(
            f"--crf ours: all pairs of pixels of an image of {width}x{height} take about {seconds / 60:.0f} minutes on "
            f"a CPU core; give --crf-side {side}, take --crf pydensecrf, or run on a GPU"
        )


class Cleaner:
    """Cleans segmentations by each of `methods`, on a CPU with several images at a time, each in a process of its own
    (`processes` at most; 1: in this one); a GPU takes one image after the other.

    To be used as a context manager. UserError for a method whose package is missing.
    """

    def __init__(self, methods: Sequence[str], processes: int, device: torch.device, side: int | None = None) -> None:
        check_methods(methods)
        self.methods = tuple(methods)
        self._device = device
        self._side = side
        on_gpu = device.type == "cuda" and "pydensecrf" not in methods
        self.processes = 1 if on_gpu else max(1, min(processes, _cores()))
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Cleaner:
        if self.processes > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, context, initializer=_begin_worker)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, items: Iterable[tuple[Tag, Tensor, Tensor]]) -> Iterator[tuple[Tag, dict[str, Cleaned]]]:
        """(tag, {method: cleaned}) of each (tag, probabilities, image) in their order; items are taken as there is
        room. probabilities (K, H, W) and image (3, H, W) uint8 as in `clean`."""
        waiting: deque[tuple[Tag, dict[str, Future[Cleaned] | Cleaned]]] = deque()
        for tag, probabilities, image in items:
            classes = likely_classes(probabilities)
            problem = (probabilities[classes], classes, image)
            waiting.append((tag, {method: self._begin(method, *problem) for method in self.methods}))
            if len(waiting) > (2 * self.processes if self._pool else 0):
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())

    def _begin(self, method: str, probabilities: Tensor, classes: Tensor, image: Tensor) -> Future[Cleaned] | Cleaned:
        if self._pool is None or (method == "ours" and self._device.type == "cuda"):
            return clean(probabilities, classes, image, method, self._side)
        problem = [part.cpu().numpy() for part in (probabilities, classes, image)]
        return self._pool.submit(_clean_in_worker, problem, method, self._side)


def _finished(tag: Tag, begun: dict[str, Future[Cleaned] | Cleaned]) -> tuple[Tag, dict[str, Cleaned]]:
    return tag, {method: each if isinstance(each, Cleaned) else each.result() for method, each in begun.items()}


def _clean_in_worker(problem: Sequence[np.ndarray], method: str, side: int | None) -> Cleaned:
    probabilities, classes, image = map(torch.from_numpy, problem)
    return clean(probabilities, classes, image, method, side)


def _begin_worker() -> None:
    """One thread a process; Ctrl-C is the parent's, and without the parent there is nothing to do."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(affinity(0)) if affinity else os.cpu_count() or 1
