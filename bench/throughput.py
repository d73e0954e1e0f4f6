"""Speed of training: `python bench/throughput.py [CONFIG ...] [key=value ...] [--suite] [--losses-only] [--out FILE]`.

Real training steps with co-training on: the method as it is usually written in PyTorch (steps/baseline.py), the same
under bf16 + torch.compile, ours, and ours with one optimisation at a time switched off. `--data real` streams fresh
batches through the data pipeline while the steps run, and says what they waited; otherwise every step gets the same
generated batch. On a CPU the providers take turns window by window; on a GPU, and with real batches, each has the
machine to itself. `--suite` is the grid of batch sizes, backbones and both data sets. `--losses-only` leaves the
networks out: from fixed network outputs to gradients. docs/results.md says how to read the figures; absolute ones count
only on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.steps.loss_path import baseline_losses, extra_memory, fused_losses
from bench.steps.output import CPU_NOTE, ENERGY_NOTE, print_table, save_chart
from bench.steps.phases import phase_times
from bench.steps.providers import Feed, OneBatch, RealBatches, changed, class_count, providers, synthetic_batch
from bench.steps.speed import Plan, Timing, attempt, compare, matrix_rate, release
from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import compute_type, pick_device
from cosa_fast.engine.base import check_backend
from cosa_fast.engine.flops import UncountableError, step_flops
from cosa_fast.errors import UserError
from cosa_fast.network.build import build_model
from cosa_fast.run import manifest

SUITE_CONFIGS = ("voc.yaml", "coco.yaml")
SUITE_SIZES = (4, 8, 16, 32)
SUITE_BACKBONES = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")


@dataclass
class Bench:
    """The options that every comparison needs; `rate`: FLOP per second of the machine's matrix products."""

    arguments: argparse.Namespace
    device: torch.device
    rate: float | None
    deadline: float

    def plan(self, per_window: int) -> Plan:
        turns = self.device.type == "cpu" and self.arguments.data == "synthetic"
        return Plan(self.device, self.arguments.windows, per_window, turns, self.deadline)


def whole_steps(config: Config, bench: Bench) -> dict[str, Any]:
    """Compare the providers for one configuration; its first step already co-trains."""
    config = changed(config, ["optim.cotrain_after=0"])
    device, arguments = bench.device, bench.arguments
    # What the user can mend shows here; later on whatever goes wrong is a provider's.
    check_backend(config.run.backend, device)
    batch, num_classes = _first_batch(config, arguments, device)
    try:
        flops = step_flops(build_model(config.model, num_classes), config, cotraining=True)
    except UncountableError as error:
        print(f"no TFLOP/s: {error}")
        flops = None

    def feed() -> Feed:
        return RealBatches(config, device) if arguments.data == "real" else OneBatch(batch)

    makers = providers(config, num_classes, device, arguments.providers)
    timings = compare(makers, feed, bench.plan(arguments.steps))
    phases = None
    if time.monotonic() < bench.deadline:
        phases = attempt(Timing(), phase_times, config, num_classes, device, batch, arguments.steps)
        release(device)
    if phases is not None and arguments.data == "real" and timings["ours"].error is None:
        phases = {"data wait": timings["ours"].summary(1, None, None)["data_wait_ms"], **phases}
    size = config.optim.batch_size
    return {
        "batch_size": size, "backbone": config.model.backbone, "crop": config.data.crop_size,
        "classes": num_classes, "data": arguments.data, "gflop_per_step": None if flops is None else flops / 1e9,
        "providers": {name: timing.summary(size, flops, bench.rate) for name, timing in timings.items()},
        "phases_ms": phases,
    }  # fmt: skip


def _first_batch(config: Config, arguments: argparse.Namespace, device: torch.device) -> tuple[Batch, int]:
    """A batch and its number of classes."""
    if arguments.data == "real":
        stream = RealBatches(config, device)
        return stream.next(), stream.classes
    num_classes = class_count(config, arguments.classes)
    return synthetic_batch(config, num_classes, device), num_classes


def loss_paths(config: Config, bench: Bench) -> dict[str, Any]:
    """Compare the way from network outputs to gradients."""
    device, size = bench.device, config.optim.batch_size
    num_classes = class_count(config, bench.arguments.classes)
    batch = synthetic_batch(config, num_classes, device)
    makers: dict[str, Callable[[], Any]] = {
        "ours": lambda: fused_losses(config, batch),
        "baseline": lambda: baseline_losses(config, batch),
    }
    if device.type == "cuda":
        plain = changed(config, ["run.backend=reference"])
        makers["plain kernels"] = lambda: fused_losses(plain, batch)
        makers["plain kernels, compiled"] = lambda: fused_losses(plain, batch, compiled=True)
    steps = {name: lambda make=make: _without_batch(make()) for name, make in makers.items()}
    timings = compare(steps, lambda: OneBatch(batch), bench.plan(1))
    for name, make in makers.items():
        if timings[name].error is None:
            timings[name].peak_bytes = attempt(timings[name], _memory, make, device)
    return {
        "batch_size": size, "crop": config.data.crop_size, "classes": num_classes,
        "providers": {name: timing.summary(size, None, None) for name, timing in timings.items()},
    }  # fmt: skip


def _without_batch(path: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda _: path()


def _memory(make: Callable[[], Callable[[], Any]], device: torch.device) -> int:
    path = make()
    if device.type == "cuda":
        path()  # compilation and first use are not part of it
    return extra_memory(path, device)


def cells(arguments: argparse.Namespace) -> Iterator[Config]:
    """The configurations to compare: every named file with every backbone and batch size."""
    names = [item for item in arguments.settings if "=" not in item]
    overrides = [item for item in arguments.settings if "=" in item]
    for name in names or (SUITE_CONFIGS if arguments.suite else SUITE_CONFIGS[:1]):
        # Random weights: how fast a network computes does not depend on them.
        config = load_config(name, ["model.weights=none", *overrides])
        for backbone in arguments.backbones or (SUITE_BACKBONES if arguments.suite else [config.model.backbone]):
            for size in arguments.batch_sizes or (SUITE_SIZES if arguments.suite else [config.optim.batch_size]):
                yield changed(config, [f"model.backbone={backbone}", f"optim.batch_size={size}"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench/throughput.py", description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key=value", help="default: voc.yaml")
    parser.add_argument("--suite", action="store_true", help="VOC and COCO x ViT-S, B, L x B = 4, 8, 16, 32")
    parser.add_argument("--data", choices=["synthetic", "real"], default="synthetic")
    parser.add_argument("--classes", type=int, help="of synthetic batches; default: those of the data set")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="default: optim.batch_size")
    parser.add_argument("--backbones", nargs="+", help="default: model.backbone")
    parser.add_argument("--providers", choices=["all", "main", "ablations", "ours"], default="all")
    parser.add_argument(
        "--losses-only", action="store_true", help="from network outputs to gradients, without networks"
    )
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="per window")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; after them no provider starts")
    parser.add_argument("--out", type=Path, help="JSON; the chart goes beside it")
    arguments = parser.parse_intermixed_args(argv)
    if min(arguments.windows, arguments.steps, 1 if arguments.classes is None else arguments.classes) < 1:
        raise UserError("--windows, --steps and --classes must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    arguments = parse(argv)
    deadline = time.monotonic() + arguments.budget
    configs = list(cells(arguments))
    device = pick_device(configs[0].run.device)
    if configs[0].run.threads is not None:
        torch.set_num_threads(configs[0].run.threads)
    rate = None if arguments.losses_only else matrix_rate(device, compute_type(configs[0].run.precision, device))
    if rate is not None:
        print(f"matrix rate: {rate['flop_per_second'] / 1e12:.3g} TFLOP/s in {rate['type']}, side {rate['side']}")
    bench = Bench(arguments, device, None if rate is None else rate["flop_per_second"], deadline)
    measure = loss_paths if arguments.losses_only else whole_steps
    machine, results = manifest.describe(configs[0], device), []
    for config in configs:
        results.append(measure(config, bench))
        if config.loss.energy > 0:
            results[-1]["note"] = ENERGY_NOTE
        print_table(results[-1])
        if arguments.out is not None:  # after each, so that a run that is cut off has not been for nothing
            written = {"machine": machine, "matrix_rate": rate, "results": results}
            arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if arguments.data == "synthetic" and not arguments.losses_only:
        print("no data wait: every step got the same generated batch")
    if device.type == "cpu":
        print(CPU_NOTE)
    if arguments.out is not None:
        save_chart(results, arguments.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
