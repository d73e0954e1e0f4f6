"""Where the time of a step goes: the parts of the fused engine, timed from outside with the device waited for."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.fused import FusedEngine


class _Watch:
    """Seconds by phase; a phase within another counts for itself alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float]] = []

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        if self._open:
            outer, since = self._open[-1]
            self.seconds[outer] += start - since
        self._open.append((name, start))
        yield
        end = self._now()
        name, since = self._open.pop()
        self.seconds[name] += end - since
        if self._open:
            self._open[-1] = (self._open[-1][0], end)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed


def phase_times(config: Config, num_classes: int, device: torch.device, batch: Batch, steps: int) -> dict[str, float]:
    """Median milliseconds of AN, labels, ON, losses, backward and optimiser. Nothing is captured in a graph here, so
    that on a GPU the sum exceeds the time of a step."""
    engine = FusedEngine(replace(config, run=replace(config.run, capture="off")), num_classes, device)
    rows: list[dict[str, float]] = []
    for index in range(steps + 1):
        watch = _Watch(device)
        parts = [
            ("AN", engine.teacher, "_forward"),
            ("labels", engine.teacher, "assign"),
            ("labels", engine, "_update_thresholds"),
            ("ON", engine.on.compute, "forward"),
            ("losses", engine, "_losses"),
            ("backward", torch.Tensor, "backward"),
            ("optimiser", engine.networks, "update"),
        ]
        with ExitStack() as patches:
            for phase, owner, name in parts:
                patches.enter_context(mock.patch.object(owner, name, watch.around(phase, getattr(owner, name))))
            with watch.phase("rest"):
                engine.run(batch)
        if index:  # the first one warms up
            rows.append({name: 1000 * seconds for name, seconds in watch.seconds.items()})
    return {
        name: statistics.median(row[name] for row in rows)
        for name in dict.fromkeys([*(part[0] for part in parts), "rest"])
    }
