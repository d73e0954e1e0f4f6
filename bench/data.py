"""Speed of the data pipelines: `python bench/data.py [CONFIG [key=value ...]] [--enlarge 500] [--out FILE.json]`.

Images per second, processor seconds and peak memory of decoding alone, the weak view, and both views, from image files
and from a pack. Every provider runs in a process of its own, and they take turns window by window, each window a
fresh stream over the same images: whatever else the machine does meets all of them, and all do the same work. The file
cache is warm: what a slow disk costs is not in these figures.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.arguments import require_positive, result_file
from bench.views.comparison import measure_all, save_chart
from bench.views.provider import STAGES
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.device import pick_device
from cosa_fast.files import write_json
from cosa_fast.run import manifest


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    cores = len(os.sched_getaffinity(0))
    counts = sorted({2**k for k in range(cores.bit_length())} | {cores})
    parser = CommandLine(prog="python bench/data.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("config", nargs="?", default="voc.yaml")
    add("overrides", nargs="*", metavar="key=value")
    add("--stages", choices=list(STAGES), nargs="+", default=list(STAGES))
    add("--workers", type=int, nargs="+", default=counts, help="worker processes, or threads; default: powers of two")
    add("--images", type=int, default=256, help="of the training split, the first so many")
    add("--enlarge", type=int, metavar="PIXELS", help="also measure JPEGs with so long a longer side")
    add("--windows", type=int, default=10)
    add("--batches", type=int, default=30, help="per window")
    add("--out", type=result_file, help="JSON; the chart goes beside it")
    arguments = parser.parse_intermixed_args(argv)
    require_positive(arguments, "windows", "batches", "images", "enlarge", "workers")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    asked = parse(argv)
    config = load_config(asked.config, asked.overrides)
    cores = len(os.sched_getaffinity(0))
    machine = manifest.describe(config, pick_device(config.run.device), cores=cores, file_cache="warm")
    numbers = {name: getattr(asked, name) for name in ("images", "enlarge", "windows", "batches")}
    for results in measure_all(config, asked.stages, asked.workers, **numbers):
        if asked.out is not None:
            write_json(asked.out, {"machine": machine, "results": results})
    if asked.out is not None:
        save_chart(results, asked.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
