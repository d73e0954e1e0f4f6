"""Where the time of a step goes: the engine's own phases, timed with the device waited for."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from bench.timing import wait_for
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.base import PHASES
from cosa_fast.engine.fused import FusedEngine


class _Watch:
    """Seconds by phase, of one step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def _now(self) -> float:
        wait_for(self._device)
        return time.perf_counter()


def phase_times(config: Config, num_classes: int, device: torch.device, batch: Batch, steps: int) -> dict[str, float]:
    """Median milliseconds of each phase, and of the rest. Nothing is captured in a graph here, so that on a GPU the sum
    exceeds the time of a step."""
    engine = FusedEngine(replace(config, run=replace(config.run, capture="off")), num_classes, device)
    rows: list[dict[str, float]] = []
    for index in range(steps + 1):
        watch = _Watch(device)
        engine.phase = watch.phase
        with watch.phase("step"):
            engine.run(batch)
        if index:  # the first one warms up
            times = {name: 1000 * watch.seconds[name] for name in PHASES}
            rows.append({**times, "rest": 1000 * watch.seconds["step"] - sum(times.values())})
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}
