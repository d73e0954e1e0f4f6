"""The part of the kernel benchmark that needs a GPU: every operator, size, provider and mode, launched and replayed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.operators.cases import OPERATORS, Problem, base_sizes, sweep_sizes
from bench.operators.limits import PREDICTED_H200, Limits, measure_limits
from bench.operators.output import machine
from bench.operators.scene import Size
from bench.operators.static import tensors
from bench.tables import failure
from bench.timing import Clock, CudaClock, HostClock, NotCaptured, Run, captured, count_launches, extra_memory, time_run

# In the order in which they are measured, so that what a time budget cuts off is the least wanted.
PROVIDERS = ("ours", "eager", "compiled")
BACKENDS = {"ours": "triton", "eager": "reference", "compiled": "reference"}
LONG_MS = 50.0  # of calls this long neither launches nor graphs are looked at: launching is nothing beside them
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One operator at one size with one provider; `sweep` names the axis of a sweep."""

    operator: str
    size: Size
    provider: str
    sweep: str | None = None

    def row(self, **values: Any) -> Row:
        """A row of the results."""
        return {"operator": self.operator, **asdict(self.size), "sweep": self.sweep, "provider": self.provider} | values


@dataclass(frozen=True)
class Bench:
    """Where, by which clock and against which limits a call is timed, and for how long."""

    device: torch.device
    clock: Clock
    limits: Limits
    budget_ms: float


def jobs(names: Sequence[str], providers: Sequence[str], sweeps: Sequence[str], quick: bool) -> Iterator[Job]:
    """All of a benchmark: the base sizes with one provider after the other, then the sweeps likewise."""
    for axes in ([None], sweeps):
        for provider in sorted(providers, key=PROVIDERS.index):
            for axis in axes:
                for name in names:
                    for size in base_sizes(name, quick=quick) if axis is None else sweep_sizes(name, axis):
                        yield Job(name, size, provider, axis)


def measure_all(todo: Sequence[Job], budget_ms: float, deadline: float, save: Callable[[Row], None]) -> Row:
    """The results of the jobs on the CUDA device, given to `save` after each, so that an interruption loses nothing.
    No job starts after `deadline` (time.perf_counter)."""
    device, clock = torch.device("cuda"), CudaClock()
    bench = Bench(device, clock, measure_limits(clock, budget_ms), budget_ms)
    rows: list[Row] = []
    results = {"kind": "measured", "machine": machine(device), "limits": asdict(bench.limits), "rows": rows}
    for number, job in enumerate(todo, 1):
        if time.perf_counter() > deadline:
            rows += [
                late.row(mode=None, graph=False, error="not run: the budget was spent") for late in todo[number - 1 :]
            ]
            break
        print(f"[{number}/{len(todo)}] {job.operator} {job.size} {job.provider}", file=sys.stderr, flush=True)
        rows += measure(job, bench)
        torch.cuda.empty_cache()
        save(results)
    return results


def measure_tiny(names: Sequence[str], save: Callable[[Row], None]) -> Row:
    """Every mode of the operators once on a CPU, ours interpreted: shows that the benchmark runs, not how fast."""
    device = torch.device("cpu")
    bench = Bench(device, HostClock(), PREDICTED_H200, budget_ms=0.0)
    rows: list[Row] = []
    results = {"kind": "measured", "machine": machine(device), "limits": asdict(bench.limits), "rows": rows}
    for provider in ("ours", "eager"):
        for name in names:
            rows += measure(Job(name, Size(2, 1, 16, "fp32"), provider), bench)
            save(results)
    return results


def measure(job: Job, bench: Bench) -> list[Row]:
    """Every mode of a job, without and with graph replay. What fails is a row with "error": the rest goes on."""
    uncompiled = OPERATORS[job.operator].uncompiled
    if job.provider == "compiled" and uncompiled:
        return [job.row(mode=None, graph=False, error=f"not tried: {uncompiled}")]
    rows = []
    mode = None
    try:
        problem, call, breaks = _setup(job, bench.device)
        # Of a sweep only the whole is of interest.
        for mode in list(problem.costs)[-1:] if job.sweep else problem.costs:
            for row in _measure_mode(job, problem, call, mode, bench):
                rows.append(row | {"graph_breaks": breaks})
    except Exception as error:  # of any kind, running out of memory among them
        rows.append(job.row(mode=mode, graph=False, error=failure(error)))
    return rows


def _setup(job: Job, device: torch.device) -> tuple[Problem, Run, int | None]:
    """The inputs, the call, and for torch.compile how often its graph breaks."""
    import torch._dynamo
    import torch._functorch.config

    problem = OPERATORS[job.operator].problem(job.size, device)
    function = problem.function
    if job.provider == "compiled":
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        # A backward is repeated on the same forward, which reused buffers would not survive.
        torch._functorch.config.donated_buffer = False
        function = torch.compile(problem.function, dynamic=False)

    def call() -> Any:
        return function(*problem.arguments, **problem.keywords, backend=BACKENDS[job.provider])

    call()
    breaks = None
    if job.provider == "compiled":
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return problem, call, breaks


def _measure_mode(job: Job, problem: Problem, call: Run, mode: str, bench: Bench) -> Iterator[Row]:
    """The row of the launched run, then on CUDA that of the replayed one."""
    prepare = _prepare(problem, call, mode)
    cost = problem.costs[mode]
    least, what = bench.limits.least(cost)
    row = job.row(mode=mode, graph=False, **asdict(cost), limit_ms=least, limited_by=what)
    run = prepare()
    timing = time_run(run, bench.clock, bench.budget_ms)
    direct = row | asdict(timing) | {"share": least / timing.ms}
    if bench.device.type != "cuda":
        yield direct
        return
    launches = count_launches(run) if timing.ms < LONG_MS else None
    yield direct | {"extra_bytes": extra_memory(run, bench.device), "launches": launches}
    del run
    yield _replay(row | {"graph": True}, prepare, launches, timing.ms, bench)


def _replay(row: Row, prepare: Callable[[], Run], launches: int | None, direct_ms: float, bench: Bench) -> Row:
    if direct_ms >= LONG_MS:
        return row | {"ms": None, "reason": f"a call takes {direct_ms:.0f} ms: its launches do not matter"}
    try:
        timing = time_run(captured(prepare), bench.clock, bench.budget_ms)
    except NotCaptured as error:
        return row | {"ms": None, "reason": str(error)}
    floor = None if launches is None else bench.limits.launching(launches)
    return row | asdict(timing) | {"share": row["limit_ms"] / timing.ms, "launch_floor_ms": floor}


def _prepare(problem: Problem, call: Run, mode: str) -> Callable[[], Run]:
    """Makes the run to time. For a backward the forward happens there, on the stream of the caller."""

    def forward() -> Run:
        return call

    def backward() -> Run:
        results = tensors(call())
        gradients = [torch.ones_like(result) for result in results]
        return lambda: torch.autograd.grad(results, problem.inputs, gradients, retain_graph=True)

    def both() -> Run:
        gradients = [torch.ones_like(result) for result in tensors(call())]
        return lambda: torch.autograd.grad(tensors(call()), problem.inputs, gradients)

    return {"forward": forward, "backward": backward, "both": both}[mode]
