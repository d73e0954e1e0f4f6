"""Steps timed side by side, in windows, with what they waited for data, peak memory and failures; and the rate of the
machine's matrix products."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.steps.providers import Feed, Step
from bench.tables import failure
from bench.timing import CudaClock, HostClock, quantiles, seconds_of, time_run

SIDES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}
OUT_OF_TIME = "left out: --budget was spent"


@dataclass
class Windows:
    """Milliseconds of one step, and of them what it waited for its batch: one entry per window. `not_captured`: why a
    step that was to be captured in a CUDA graph was not."""

    milliseconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None
    not_captured: str | None = None

    def summary(self, images: int, flops: float | None, rate: float | None) -> dict[str, Any]:
        """Median with 20/80 quantiles, images and TFLOP per second, share of `rate` (FLOP per second)."""
        if self.error is not None:
            return {"error": self.error}
        low, median, high = quantiles(self.milliseconds)
        per_second = None if flops is None else 1000 * flops / median
        return {
            "ms": median, "ms_20": low, "ms_80": high, "windows": len(self.milliseconds),
            "images_per_second": 1000 * images / median,
            "data_wait_ms": statistics.median(self.waited),
            "tflop_per_second": None if per_second is None else per_second / 1e12,
            "share_of_matrix_rate": None if per_second is None or rate is None else per_second / rate,
            "peak_mib": None if self.peak_bytes is None else self.peak_bytes / 2**20,
            **({} if self.not_captured is None else {"not_captured": self.not_captured}),
        }  # fmt: skip


@dataclass
class Plan:
    """How to time: `windows` windows of `per_window` steps each. `turns`: all providers are alive at once and take
    turns window by window, so that whatever else the machine does meets all of them; otherwise one after another,
    each with the memory to itself. No provider starts after `deadline` (time.monotonic)."""

    device: torch.device
    windows: int
    per_window: int
    turns: bool
    deadline: float


def compare(makers: dict[str, Callable[[], Step]], feeds: Callable[[], Feed], plan: Plan) -> dict[str, Windows]:
    """Time the step of every maker, each on a feed of its own, after a few steps to warm up. One that fails is recorded
    as such, and the others go on."""
    timings = {name: Windows() for name in makers}
    for group in [list(makers)] if plan.turns else [[name] for name in makers]:
        _compare_group({name: makers[name] for name in group}, feeds, plan, timings)
        release(plan.device)
    return timings


def _compare_group(
    makers: dict[str, Callable[[], Step]], feeds: Callable[[], Feed], plan: Plan, timings: dict[str, Windows]
) -> None:
    alive: dict[str, tuple[Step, Feed]] = {}
    for name, make in makers.items():
        if time.monotonic() > plan.deadline:
            timings[name].error = OUT_OF_TIME
        elif started := attempt(timings[name], _start, make, feeds, timings[name], plan):
            alive[name] = started
    for _ in range(plan.windows):
        for name in list(alive):
            attempt(timings[name], _add_window, timings[name], *alive[name], plan)
            if timings[name].error is not None:
                del alive[name]


def attempt(timing: Windows, action: Callable[..., Any], *arguments: Any) -> Any:
    """What the action returns; None where it fails, with the reason in `timing`."""
    try:
        return action(*arguments)
    except Exception as error:  # compilers and drivers raise all sorts, and the other providers are worth measuring
        timing.error = failure(error)
        return None


def release(device: torch.device) -> None:
    """Free what the last provider held; its compiled code would also count against the next one's limit of
    recompilations."""
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()


def _start(make: Callable[[], Step], feeds: Callable[[], Feed], timing: Windows, plan: Plan) -> tuple[Step, Feed]:
    on_gpu = plan.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step, feed = make(), feeds()
    # A captured step is captured at its fourth call.
    window(step, feed, plan.device, max(plan.per_window, 5) if on_gpu else 1)
    timing.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
    timing.not_captured = getattr(step, "not_captured", None)
    return step, feed


def _add_window(timing: Windows, step: Step, feed: Feed, plan: Plan) -> None:
    before = feed.waited
    milliseconds = window(step, feed, plan.device, plan.per_window)
    timing.milliseconds.append(milliseconds / plan.per_window)
    timing.waited.append(1000 * (feed.waited - before) / plan.per_window)


def window(step: Step, feed: Feed, device: torch.device, count: int) -> float:
    """Milliseconds of `count` steps."""

    def steps() -> None:
        for _ in range(count):
            step(feed.next())

    return 1000 * seconds_of(steps, device)


def matrix_rate(device: torch.device, dtype: torch.dtype, sides: tuple[int, ...] | None = None) -> dict[str, Any]:
    """FLOP per second of the fastest of a few square matrix products in a type, by its median: what a step's rate is
    held against."""
    clock = CudaClock() if device.type == "cuda" else HostClock()
    best: dict[str, Any] = {"flop_per_second": 0.0}
    for side in sides or SIDES[device.type]:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found = 2000 * side**3 / time_run(lambda a=left, b=right: a @ b, clock, 200.0).ms
        if found > best["flop_per_second"]:
            best = {"flop_per_second": found, "side": side, "type": str(dtype).removeprefix("torch.")}
    return best
