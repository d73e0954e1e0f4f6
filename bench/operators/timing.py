"""Clocks of the kernel benchmark: medians with quantiles, CUDA-graph replay, extra memory, and the device's limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.operators.cases import Cost
from cosa_fast.kernels.launch.runtime import HAS_TRITON, tl, triton_jit

Run = Callable[[], Any]
FEWEST, MOST = 3, 200  # repetitions
FLUSH_BYTES = 256 * 2**20  # more than any second-level cache


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

    Events lie in the stream: where the host is slower than the device at launching, that waiting is in the time.
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
    repetitions = round(min(max(budget_ms / estimate, FEWEST), MOST))
    return summarise(clock.times(run, repetitions))


def summarise(times: Sequence[float]) -> Timing:
    """Median and quantiles, linear between the nearest two runs."""
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(float(middle), float(low), float(high), len(times))


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
            raise NotCaptured(describe(error)) from error
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


def describe(error: Exception) -> str:
    """An exception as one short line for a table of results."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def extra_memory(run: Run) -> int:
    """Bytes that a run holds at its peak beyond those held before it: results and everything between."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


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


@dataclass(frozen=True)
class Limits:
    """What a device can move and compute in a second, and what a graph replay takes that does nothing.

    `flops` is the rate of float32 multiply-adds outside the matrix units.
    """

    source: str
    bytes: float
    exps: float
    flops: float
    replay_ms: float = 0.0  # of a graph with one trivial kernel
    next_launch_ms: float = 0.0  # of every further one

    def least(self, cost: Cost) -> tuple[float, str]:
        """(milliseconds, what decides): no implementation of that cost is faster."""
        times = {
            "bytes": cost.bytes / self.bytes,
            "exps": cost.exps / self.exps,
            "flops": cost.flops / self.flops,
        }
        what = max(times, key=lambda name: times[name])
        return 1e3 * times[what], what

    def launching(self, launches: int) -> float:
        """Milliseconds that a replay of so many trivial kernels takes."""
        return self.replay_ms + self.next_launch_ms * (launches - 1)


# 132 multiprocessors at 1.755 GHz: 16 exponentials and 128 multiply-adds a clock each; 4.8 TB/s.
PREDICTED_H200 = Limits("predicted for one H200", 4.8e12, 132 * 16 * 1.755e9, 132 * 128 * 2 * 1.755e9)


@triton_jit
def _exp_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # (programs · BLOCK,) float32
    turns,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    x = lane.to(tl.float32) / BLOCK
    for _ in range(turns):
        x = tl.exp2(-x)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + lane, x)


def measure_limits(clock: Clock, budget_ms: float = 100.0) -> Limits:
    """The rates of the CUDA device at hand: a copy of 1 GiB, exponentials in registers, a float32 matrix product."""
    left, right = (torch.randn(4096, 4096, device="cuda") for _ in range(2))
    product = time_run(lambda: left @ right, clock, budget_ms).ms
    one = torch.zeros(1, device="cuda")
    first, many = (time_run(captured(partial(_repeat, one, n)), clock, budget_ms).ms for n in (1, 101))
    return Limits(
        "measured in this run",
        bytes=_copy_rate(clock, budget_ms),
        exps=_exp_rate(clock, budget_ms),
        flops=2 * 4096**3 / product * 1e3,
        replay_ms=first,
        next_launch_ms=max(many - first, 0.0) / 100,
    )


def _copy_rate(clock: Clock, budget_ms: float) -> float:
    """Bytes a second, read and written."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * 2**30 / time_run(lambda: target.copy_(source), clock, budget_ms).ms * 1e3


def _repeat(tensor: Tensor, times: int) -> Run:
    def run() -> None:
        for _ in range(times):
            tensor.add_(1)

    return run


def _exp_rate(clock: Clock, budget_ms: float, turns: int = 4096, block: int = 1024) -> float:
    """Exponentials a second, without memory traffic; without Triton the prediction stands in."""
    if not HAS_TRITON:
        return PREDICTED_H200.exps
    programs = 16 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * block, device="cuda")
    timing = time_run(lambda: _exp_kernel[(programs,)](out, turns, BLOCK=block, num_warps=4), clock, budget_ms)
    return programs * block * turns / timing.ms * 1e3
