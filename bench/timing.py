"""The clocks of every benchmark: quantiles, the time of a call, its replay from a CUDA graph, its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from bench.tables import failure

Run = Callable[[], Any]
FEWEST, MOST = 3, 200  # repetitions
FLUSH_BYTES = 256 * 2**20  # more than any second-level cache


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20 %, median, 80 %: linear between the nearest two values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Run, device: torch.device) -> float:
    """Wall time of a run and of what it gives the device to do."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


class Clock(Protocol):
    """Times repeated runs."""

    def times(self, run: Run, repetitions: int) -> list[float]:
        """Milliseconds of each repetition."""


class HostClock:
    """For devices that compute while the host waits."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def times(self, run: Run, repetitions: int) -> list[float]:
        found = []
        for _ in range(repetitions):
            start = self._now()
            run()
            found.append(1e3 * (self._now() - start))
        return found


class CudaClock:
    """Device time between two events around each run, the caches flushed before it.

    Events lie in the stream: where the host launches more slowly than the device computes, that waiting counts.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def times(self, run: Run, repetitions: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


@dataclass(frozen=True)
class Timing:
    """Median milliseconds, the 20 % and 80 % quantiles, and how many runs they are of."""

    ms: float
    ms_20: float
    ms_80: float
    repetitions: int


def time_run(run: Run, clock: Clock, budget_ms: float) -> Timing:
    """Warm up once, estimate from a second run, then as many runs as fit into the budget, between FEWEST and MOST."""
    run()
    estimate = max(clock.times(run, 1)[0], 1e-6)
    times = clock.times(run, round(min(max(budget_ms / estimate, FEWEST), MOST)))
    low, median, high = quantiles(times)
    return Timing(median, low, high, len(times))


class NotCaptured(Exception):
    """Why a run cannot be replayed from a CUDA graph."""


def captured(prepare: Callable[[], Run]) -> Run:
    """The replay of a CUDA graph of the run that `prepare` makes.

    Preparation, warm-up and capture share a stream: autograd replays a backward on the stream of its forward. A run
    that waits for the device is found before the capture, which it would leave half done.

    Raises:
        NotCaptured: the run synchronises, or something in it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run = prepare()
        run()
        try:
            _refuse_synchronisation(run)
            with torch.cuda.graph(graph, stream=stream):
                run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise NotCaptured(failure(error)) from error
        finally:
            torch.cuda.synchronize()
    # The graph reads what the run holds, but does not keep it.
    return partial(_replay, graph, run)


def _replay(graph: torch.cuda.CUDAGraph, run: Run) -> None:
    graph.replay()


def _refuse_synchronisation(run: Run) -> None:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def count_launches(run: Run) -> int | None:
    """Kernels, copies and fills that a run puts on the device; None where the profiler sees none."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            run()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in trace.events() or []) or None
    except RuntimeError:
        return None


def extra_memory(run: Run, device: torch.device) -> int:
    """Bytes that a run holds at its peak beyond those held before it: results and everything between."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
