"""Benchmark of the kernels: `python bench/kernels.py [--operators NAME ...] [--quick] [--out FILE.json]`.

With CUDA: eager PyTorch (the definition), torch.compile of it, and ours; forward, backward, both; launched from the
host and replayed from a CUDA graph; then sweeps. Without, or with --static: what every kernel takes of a
multiprocessor on four architectures, and predicted limits. docs/kernels.md explains the columns.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.arguments import require_positive, result_file
from bench.operators.cases import OPERATORS, SWEEPS
from bench.operators.measured import PROVIDERS, jobs, measure_all, measure_tiny
from bench.operators.output import print_measured, print_static, save_chart, write
from bench.operators.static import compile_all
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.errors import UserError, hint
from cosa_fast.kernels.launch.offline import ARCHITECTURES

QUICK_SECONDS = 110.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = CommandLine(
        prog="python bench/kernels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--operators", nargs="+", metavar="NAME", default=list(OPERATORS), help="default: all")
    add("--providers", nargs="+", metavar="NAME", default=list(PROVIDERS), help="of ours, eager, compiled")
    add("--sweeps", nargs="*", metavar="AXIS", default=None, help=f"of {', '.join(SWEEPS)}; default: all, quick: none")
    add("--quick", action="store_true", help="few sizes, no sweeps, at most 150 seconds")
    add("--tiny", action="store_true", help="a walk through on a CPU with TRITON_INTERPRET=1; its figures mean nothing")
    add("--budget", type=float, metavar="SECONDS", help="start nothing more after so many seconds")
    add(
        "--static",
        action="store_true",
        excludes="--tiny",
        help="compile instead of measuring, as where there is no GPU",
    )
    add("--architectures", nargs="+", metavar="NAME", default=list(ARCHITECTURES), help="of the static part")
    add("--processes", type=int, default=1, help="of the static part")
    add("--out", type=result_file, metavar="FILE.json", help="write the results here, with a .csv and a .png beside it")
    add("--no-chart", action="store_true", needs="--out", help="no .png")
    arguments = parser.parse_args(argv)
    if arguments.sweeps is None:
        arguments.sweeps = [] if arguments.quick else list(SWEEPS)
    if arguments.budget is None:
        arguments.budget = QUICK_SECONDS if arguments.quick else float("inf")
    known = {
        "operators": OPERATORS, "providers": PROVIDERS, "sweeps": SWEEPS, "architectures": ARCHITECTURES,
    }  # fmt: skip
    for option, names in known.items():
        for name in getattr(arguments, option):
            if name not in names:
                raise UserError(f"--{option}: got {name!r}, want of {', '.join(names)}{hint(name, names)}")
    require_positive(arguments, "processes")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, or compile; returns the exit status."""
    deadline = time.perf_counter()
    arguments = parse(argv)
    deadline += arguments.budget
    quick, out = arguments.quick, arguments.out
    if arguments.tiny:
        results = measure_tiny(arguments.operators, partial(write, out) if out else lambda _: None)
        print_measured(results)
    elif arguments.static or not torch.cuda.is_available():
        results = compile_all(arguments.operators, arguments.architectures, quick=quick, processes=arguments.processes)
        print_static(results)
    else:
        todo = list(jobs(arguments.operators, arguments.providers, arguments.sweeps, quick))
        save: Any = partial(write, out) if out else lambda _: None
        results = measure_all(todo, 40.0 if quick else 200.0, deadline, save)
        print_measured(results)
    if out:
        write(out, results)
        if not arguments.no_chart:
            save_chart(out.with_suffix(".png"), results)
    failed = sum("error" in row and not row["error"].startswith("not ") for row in results["rows"])
    if failed:
        print(f"{failed} of {len(results['rows'])} rows failed; their errors are in the results", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
