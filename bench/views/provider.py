"""One way of preparing training images, timed in a process of its own, so that its memory and its processor time,
worker processes included, are nobody else's.

Linux: processor time and memory of the workers are read from /proc.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from bench.tables import failure
from bench.timing import seconds_of
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.data_pipeline.views.parameters import AugmentConfig, image_index

STAGES = {"decode": "decode only", "weak": "weak view", "both": "weak and strong view"}
DECODED = 20  # times as many batches where nothing but decoding is done: CPU time comes in hundredths of a second
WARM_UP = 2  # batches per worker or thread before the clock starts: the queues must be as empty as they will stay


@dataclass(frozen=True)
class Provider:
    """What is timed. `pipeline`: "torch", "DALI" (on the CPU) or "DALI GPU"; `count`: its workers or threads. `pack`:
    None for image files.
    """

    pipeline: str
    count: int
    stage: str
    root: Path
    pack: Path | None
    augment: AugmentConfig
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        """As the table calls it."""
        unit = "worker" if self.pipeline == "torch" else "thread"
        source = "files" if self.pack is None else "packed"
        return f"{self.pipeline}, {self.count} {unit}{'s' * (self.count > 1)}, {source}"

    def stream(self) -> Iterator[Any]:
        """Endless batches, from the same first image every time."""
        dataset = open_dataset("voc", self.root, "train", pack=self.pack)
        config = replace(self.augment, strong=self.stage == "both")
        common = (dataset, config, self.batch_size, self.seed)
        if self.pipeline == "torch" and self.stage == "decode":
            return _decoded_by_pil(dataset, self)
        if self.pipeline == "torch":
            return iter(TorchPipeline(*common, workers=self.count))
        from bench.views.dali import decoding_stream
        from cosa_fast.data_pipeline.dali.pipeline import DaliPipeline

        if self.stage == "decode":
            return decoding_stream(dataset, self.batch_size, self.seed, self.count, self.device)
        return iter(DaliPipeline(*common, device=self.device, threads=self.count))

    @property
    def device(self) -> torch.device:
        """Where its batches are."""
        return torch.device("cuda" if self.pipeline == "DALI GPU" else "cpu")


@dataclass(frozen=True)
class Window:
    """One measurement: seconds of `images` images, processor seconds of all processes meanwhile, and the sum of their
    peak resident memories.
    """

    images: int
    seconds: float
    cpu_seconds: float
    rss_bytes: int


class Served:
    """A provider in its own process, which waits between windows."""

    def __init__(self, provider: Provider, batches: int) -> None:
        self.error: str | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, provider, batches))
        self._process.start()
        other.close()

    def window(self) -> Window | None:
        """Measure once; None when it failed, now or before: `error` says why."""
        if self.error is None:
            try:
                self._connection.send(True)
                answer = self._connection.recv()
            except (EOFError, OSError):
                answer = "its process died"
            if isinstance(answer, Window):
                return answer
            self.error = answer
        return None

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(30)
        self._process.kill()


def _serve(connection: Connection, provider: Provider, batches: int) -> None:
    # A spawned process would spawn its workers too; in training they are started as the platform does.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        try:
            connection.send(measure(provider, batches))
        except Exception as error:  # the others are still worth measuring
            connection.send(failure(error))


def measure(provider: Provider, batches: int) -> Window:
    """Time `batches` batches (DECODED times as many of decoding alone) of a stream just started and warmed up."""
    batches *= DECODED if provider.stage == "decode" else 1
    with closing(provider.stream()) as stream:  # type: ignore[type-var]
        take = partial(_take, stream)
        take(1 + WARM_UP * provider.count)
        processes = [os.getpid(), *_children()]
        cpu = _cpu_seconds(processes)
        seconds = seconds_of(partial(take, batches), provider.device)
        used = _cpu_seconds(processes) - cpu
        return Window(batches * provider.batch_size, seconds, used, sum(map(_peak_bytes, processes)))


def _take(stream: Iterator[Any], count: int) -> None:
    for _ in islice(stream, count):
        pass


class _Decoded(Dataset[tuple[int, int]]):
    """Sample position -> size of the decoded image: pixels stay where they were decoded."""

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, position: int) -> tuple[int, int]:
        return self.dataset.image(image_index(self.seed, position, len(self.dataset))).size


def _decoded_by_pil(dataset: ImageDataset, provider: Provider) -> Iterator[Any]:
    loader = DataLoader(
        _Decoded(dataset, provider.seed),
        batch_size=provider.batch_size,
        num_workers=provider.count,
        collate_fn=list,
        generator=torch.Generator(),
    )
    yield from loader


def _children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def _cpu_seconds(processes: list[int]) -> float:
    """User and system time so far."""
    ticks = 0
    for pid in processes:
        # The second field, the name in brackets, may hold blanks: count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _peak_bytes(pid: int) -> int:
    """The process's largest resident set so far; pages that processes share count in each."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
