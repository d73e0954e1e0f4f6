"""The least that an operator must move and compute, and what a device can: no implementation takes less time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.timing import Clock, Run, captured, time_run
from cosa_fast.kernels.launch.runtime import HAS_TRITON, tl, triton_jit


@dataclass(frozen=True)
class Cost:
    """The least that one direction of an operator moves and computes."""

    bytes: int = 0
    exps: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.exps + other.exps, self.flops + other.flops)


@dataclass(frozen=True)
class Limits:
    """What a device can move and compute in a second, and what it takes to replay a graph of trivial kernels.

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
