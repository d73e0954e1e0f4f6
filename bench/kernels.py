"""Benchmark of the kernels: `python bench/kernels.py [--operators NAME ...] [--quick] [--out FILE.json]`.

With CUDA: eager PyTorch (the definition), torch.compile of it, and ours; forward, backward, both; launched from the
host and replayed from a CUDA graph; then sweeps. Without, or with --static: what every kernel takes of a
multiprocessor on four architectures, and predicted limits. docs/kernels.md explains the columns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.operators.cases import OPERATORS, SWEEPS, Operator, Problem, Size, base_sizes, sweep_sizes
from bench.operators.output import machine, print_measured, print_static, write
from bench.operators.static import limit_rows, resource_rows, tensors
from bench.operators.timing import (
    Clock,
    CudaClock,
    Limits,
    NotCaptured,
    Run,
    captured,
    count_launches,
    describe,
    extra_memory,
    measure_limits,
    time_run,
)
from cosa_fast.cli import run_cli
from cosa_fast.errors import UserError
from cosa_fast.kernels.launch.offline import ARCHITECTURES, source_hash
from cosa_fast.kernels.launch.runtime import HAS_TRITON, INTERPRETED

# In the order in which they are measured, so that what a time budget cuts off is the least wanted.
PROVIDERS = ("ours", "eager", "compiled")
BACKENDS = {"ours": "triton", "eager": "reference", "compiled": "reference"}
QUICK_SECONDS = 110.0
LONG_MS = 50.0  # of calls this long neither launches nor graphs are looked at: launching is nothing beside them


@dataclass(frozen=True)
class Job:
    """One operator at one size with one provider; `sweep` names the axis of a sweep."""

    operator: str
    size: Size
    provider: str
    sweep: str | None = None

    def row(self, **values: Any) -> dict[str, Any]:
        """A row of the results."""
        return {"operator": self.operator, **asdict(self.size), "sweep": self.sweep, "provider": self.provider} | values


def jobs(names: Sequence[str], providers: Sequence[str], sweeps: Sequence[str], quick: bool) -> Iterator[Job]:
    """All of a benchmark: the base sizes with one provider after the other, then the sweeps likewise."""
    for provider in sorted(providers, key=PROVIDERS.index):
        for name in names:
            for size in base_sizes(name, quick=quick):
                yield Job(name, size, provider)
    for provider in sorted(providers, key=PROVIDERS.index):
        for axis in sweeps:
            for name in names:
                for size in sweep_sizes(name, axis):
                    yield Job(name, size, provider, axis)


def measure(job: Job, device: torch.device, clock: Clock, limits: Limits, budget_ms: float) -> list[dict[str, Any]]:
    """Every mode of a job, without and with graph replay. What fails is a row with "error": the rest goes on."""
    operator = OPERATORS[job.operator]
    if job.provider == "compiled" and operator.uncompiled:
        return [job.row(mode=None, graph=False, error=f"not tried: {operator.uncompiled}")]
    rows = []
    mode = None
    try:
        problem, call, breaks = _setup(operator, job, device)
        # Of a sweep only the whole is of interest.
        for mode in list(problem.costs)[-1:] if job.sweep else problem.costs:
            for row in _measure_mode(job, problem, call, mode, clock, limits, budget_ms):
                rows.append(row | {"graph_breaks": breaks})
    except Exception as error:  # of any kind, running out of memory among them
        rows.append(job.row(mode=mode, graph=False, error=describe(error)))
    return rows


def _setup(operator: Operator, job: Job, device: torch.device) -> tuple[Problem, Run, int | None]:
    """The inputs, the call, and for torch.compile how often its graph breaks."""
    import torch._dynamo
    import torch._functorch.config

    problem = operator.problem(job.size, device)
    backend = BACKENDS[job.provider]
    function: Callable[..., Any] = problem.function
    if job.provider == "compiled":
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        # A backward is repeated on the same forward, which reused buffers would not survive.
        torch._functorch.config.donated_buffer = False
        function = torch.compile(problem.function, dynamic=False)

    def call() -> Any:
        return function(*problem.arguments, **problem.keywords, backend=backend)

    call()
    breaks = None
    if job.provider == "compiled":
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return problem, call, breaks


def _measure_mode(
    job: Job, problem: Problem, call: Run, mode: str, clock: Clock, limits: Limits, budget_ms: float
) -> Iterator[dict[str, Any]]:
    """The row of the launched run, then on CUDA that of the replayed one."""
    prepare = _prepare(problem, call, mode)
    cost = problem.costs[mode]
    least, what = limits.least(cost)
    row = job.row(mode=mode, graph=False, **asdict(cost), limit_ms=least, limited_by=what)
    run = prepare()
    timing = time_run(run, clock, budget_ms)
    direct = row | asdict(timing) | {"share": least / timing.ms}
    if not isinstance(clock, CudaClock):
        yield direct
        return
    launches = count_launches(run) if timing.ms < LONG_MS else None
    yield direct | {"extra_bytes": extra_memory(run), "launches": launches}
    del run
    yield _replay(row | {"graph": True}, prepare, launches, timing.ms, clock, limits, budget_ms)


def _replay(
    row: dict[str, Any],
    prepare: Callable[[], Run],
    launches: int | None,
    direct_ms: float,
    clock: Clock,
    limits: Limits,
    budget_ms: float,
) -> dict[str, Any]:
    if direct_ms >= LONG_MS:
        return row | {"ms": None, "reason": f"a call takes {direct_ms:.0f} ms: its launches do not matter"}
    try:
        timing = time_run(captured(prepare), clock, budget_ms)
    except NotCaptured as error:
        return row | {"ms": None, "reason": str(error)}
    floor = None if launches is None else limits.launching(launches)
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


def run_measured(arguments: argparse.Namespace, started: float) -> dict[str, Any]:
    """Measure all jobs on the CUDA device; the file is written after each, so that an interruption loses nothing."""
    device, clock = torch.device("cuda"), CudaClock()
    budget_ms = 40.0 if arguments.quick else 200.0
    limits = measure_limits(clock, budget_ms)
    rows: list[dict[str, Any]] = []
    results = {"kind": "measured", "machine": machine(device), "limits": asdict(limits), "rows": rows}
    todo = list(jobs(arguments.operators, arguments.providers, arguments.sweeps, arguments.quick))
    for number, job in enumerate(todo, 1):
        if arguments.budget is not None and time.perf_counter() - started > arguments.budget:
            skipped = f"not run: the budget of {arguments.budget:g} s was spent"
            rows += [late.row(mode=None, graph=False, error=skipped) for late in todo[number - 1 :]]
            break
        print(f"[{number}/{len(todo)}] {job.operator} {job.size} {job.provider}", file=sys.stderr, flush=True)
        rows += measure(job, device, clock, limits, budget_ms)
        torch.cuda.empty_cache()
        if arguments.out:
            write(arguments.out, results)
    return results


def run_static(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile everything for every architecture."""
    if not HAS_TRITON:
        raise UserError("the package triton is not installed: there is nothing to compile; pip install triton")
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is set, but kernels are compiled here; unset it")
    rows = resource_rows(
        arguments.operators, arguments.architectures, quick=arguments.quick, processes=arguments.processes
    )
    limits = limit_rows(arguments.operators, quick=arguments.quick)
    whole = (arguments.operators, arguments.architectures, arguments.quick) == ([*OPERATORS], [*ARCHITECTURES], False)
    compiled = {"kernels_hash": source_hash() if whole else None}  # a part of it says nothing of all kernels
    return {"kind": "static", "machine": machine(torch.device("cpu")), **compiled, "rows": rows, "limits": limits}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="bench/kernels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--operators", nargs="+", metavar="NAME", default=list(OPERATORS), help="default: all")
    add("--providers", nargs="+", metavar="NAME", default=list(PROVIDERS), help="of ours, eager, compiled")
    add("--sweeps", nargs="*", metavar="AXIS", default=None, help=f"of {', '.join(SWEEPS)}; default: all, quick: none")
    add("--quick", action="store_true", help="few sizes, no sweeps, at most 150 seconds")
    add("--budget", type=float, metavar="SECONDS", help="start nothing more after so many seconds")
    add("--static", action="store_true", help="compile instead of measuring, as where there is no GPU")
    add("--architectures", nargs="+", metavar="NAME", default=list(ARCHITECTURES), help="of the static part")
    add("--processes", type=int, default=1, help="of the static part")
    add("--out", type=Path, metavar="FILE.json", help="write the results here, with a .csv and a .png beside it")
    arguments = parser.parse_args(argv)
    if arguments.sweeps is None:
        arguments.sweeps = [] if arguments.quick else list(SWEEPS)
    if arguments.quick and arguments.budget is None:
        arguments.budget = QUICK_SECONDS
    known = {
        "operators": OPERATORS, "providers": PROVIDERS, "sweeps": SWEEPS, "architectures": ARCHITECTURES,
    }  # fmt: skip
    for option, names in known.items():
        for name in getattr(arguments, option):
            if name not in names:
                raise UserError(f"--{option}: got {name!r}, want of {', '.join(names)}")
    if arguments.processes < 1:
        raise UserError(f"--processes: got {arguments.processes}, want at least 1")
    if arguments.out and not arguments.out.absolute().parent.is_dir():
        raise UserError(f"--out: no folder {arguments.out.parent}; make it first")
    return arguments


def main(argv: list[str]) -> int:
    started = time.perf_counter()
    arguments = parse(argv)
    if arguments.static or not torch.cuda.is_available():
        results = run_static(arguments)
        print_static(results)
    else:
        results = run_measured(arguments, started)
        print_measured(results)
    if arguments.out:
        write(arguments.out, results, plot=True)
    failed = sum("error" in row and not row["error"].startswith("not ") for row in results["rows"])
    if failed:
        print(f"{failed} of {len(results['rows'])} rows failed; their errors are in the results", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
