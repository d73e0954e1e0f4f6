"""Speed of training: `python bench/throughput.py [CONFIG ...] [key=value ...] [--suite] [--losses-only] [--out FILE]`.

Real training steps with co-training on: the method as it is usually written in PyTorch (steps/baseline.py), the same
under bf16 + torch.compile, ours, and ours with one optimisation at a time switched off. `--data real` streams fresh
batches through the data pipeline while the steps run, and says what they waited; otherwise every step gets the same
generated batch. On a CPU the providers take turns window by window; on a GPU, and with real batches, each has the
machine to itself. `--suite` is the grid of batch sizes, backbones and both data sets. `--losses-only` leaves the
networks out: from fixed network outputs to gradients. `--attention` compares the kernels by which ON and AN can attend,
one network at a time; those that cannot run here say why. docs/results.md says how to read the figures; absolute ones
count only on a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.arguments import require_positive, result_file, split_settings
from bench.steps.providers import BACKBONES, KINDS
from bench.steps.throughput import Options, grid, measure_all, save_chart
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.files import write_json

SUITE_CONFIGS = ["voc.yaml", "coco.yaml"]
SUITE_SIZES = (4, 8, 16, 32)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked; --suite filled in."""
    parser = CommandLine(prog="python bench/throughput.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("settings", nargs="*", metavar="CONFIG | key=value", help="default: voc.yaml")
    add("--suite", action="store_true", help="VOC and COCO x ViT-S, B, L x B = 4, 8, 16, 32")
    add("--data", choices=["synthetic", "real"], default="synthetic")
    add("--classes", type=int, help="of synthetic batches; default: those of the data set")
    add("--batch-sizes", type=int, nargs="+", help="default: optim.batch_size")
    add("--backbones", nargs="+", help="default: model.backbone")
    add("--providers", choices=["all", "main", "ablations", "ours", "quick", "baseline"], default="all")
    add(
        "--attention",
        nargs="*",
        choices=KINDS,
        metavar="KIND",
        excludes="--losses-only",
        help=f"only kernels for attention: {', '.join(KINDS)}; default: all",
    )
    add("--losses-only", action="store_true", help="from network outputs to gradients, without networks")
    add("--windows", type=int, default=10)
    add("--steps", type=int, default=5, help="per window")
    add("--budget", type=float, default=float("inf"), help="seconds; after them no provider starts")
    add("--out", type=result_file, help="JSON; the chart goes beside it")
    add("--no-chart", action="store_true", needs="--out", help="JSON alone")
    arguments = parser.parse_intermixed_args(argv)
    require_positive(arguments, "windows", "steps", "classes", "batch_sizes")
    arguments.configs, arguments.overrides = split_settings(arguments.settings)
    arguments.configs = arguments.configs or (SUITE_CONFIGS if arguments.suite else SUITE_CONFIGS[:1])
    if arguments.suite:
        arguments.batch_sizes = arguments.batch_sizes or SUITE_SIZES
        arguments.backbones = arguments.backbones or list(BACKBONES.values())
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    asked = parse(argv)
    options = Options(
        losses_only=asked.losses_only,
        real_data=asked.data == "real",
        classes=asked.classes,
        providers=asked.providers,
        attention=None if asked.attention is None else tuple(asked.attention or KINDS),
        windows=asked.windows,
        steps=asked.steps,
        deadline=time.monotonic() + asked.budget,
    )
    configs = list(grid(asked.configs, asked.overrides, asked.backbones, asked.batch_sizes))
    for written in measure_all(configs, options):
        if asked.out is not None:  # after each, so that a run that is cut off has not been for nothing
            write_json(asked.out, written)
    if asked.out is not None and not asked.no_chart:
        save_chart(written["results"], asked.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
