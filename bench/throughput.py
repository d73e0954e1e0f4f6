"""Speed of training: `python bench/throughput.py [CONFIG [key=value ...]] [--losses-only] [--out FILE.json]`.

Real training steps on one batch, with co-training on: the method as it is usually written in PyTorch
(bench/baseline.py), the same under bf16 + torch.compile, ours, and ours with one optimisation at a time switched off.
The providers take turns window by window, so that whatever else the machine does meets all of them. `--losses-only`
leaves the networks out: from fixed network outputs to gradients. docs/results.md says how to read the figures; absolute
ones count only on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from baseline import Baseline
from loss_path import baseline_losses, extra_memory, fused_losses
from phases import phase_times
from torch.utils.flop_counter import FlopCounterMode

from cosa_fast import manifest
from cosa_fast.cli import run_cli
from cosa_fast.config import Config, load_config
from cosa_fast.data import choose_pipeline, open_datasets, open_pipeline
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import pick_device
from cosa_fast.engine import Engine
from cosa_fast.errors import UserError
from cosa_fast.fused_engine import FusedEngine

# What each line of the speed ablation switches off.
ABLATIONS = {
    "ours, eager blocks": ["run.compile=off"],
    "ours, no CUDA graph": ["run.capture=off"],
    "ours, plain kernels": ["run.backend=reference"],
    "ours, fp32": ["run.precision=fp32"],
    "ours, plain engine": ["run.engine=plain"],
}
CPU_NOTE = "Figures of a CPU compare providers within this run; they say nothing about a GPU."


@dataclass
class Timing:
    """Milliseconds of one step: one entry per window."""

    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None

    def summary(self, images: int, flops: float | None) -> dict[str, Any]:
        """Median with 20/80 quantiles, images and TFLOP per second."""
        if self.error is not None:
            return {"error": self.error}
        low, median, high = quantiles(self.milliseconds)
        return {
            "ms": median, "ms_20": low, "ms_80": high, "windows": len(self.milliseconds),
            "images_per_second": 1000 * images / median,
            "tflop_per_second": None if flops is None else flops / median / 1e9,
            "peak_mib": None if self.peak_bytes is None else self.peak_bytes / 2**20,
        }  # fmt: skip


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20 %, median, 80 %."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def synthetic_batch(config: Config, num_classes: int, device: torch.device) -> Batch:
    """A batch of smooth noise: one to three classes per image, a padded border in some."""
    generator = torch.Generator().manual_seed(config.run.seed)
    size, count = config.data.crop_size, config.optim.batch_size
    coarse = torch.randn(2, count, 3, size // 16, size // 16, generator=generator)
    weak, strong = (torch.nn.functional.interpolate(view, size=(size, size), mode="bicubic") for view in coarse)
    labels = torch.zeros(count, num_classes)
    for row in labels:
        present = 1 + int(torch.randint(3, (), generator=generator))
        row[torch.randperm(num_classes, generator=generator)[:present]] = 1
    valid = torch.ones(count, size, size, dtype=torch.bool)
    valid[::2, : size // 8] = False
    return Batch(weak, strong, labels, valid, [str(index) for index in range(count)]).to(device)


def real_batch(config: Config, device: torch.device) -> tuple[Batch, int]:
    """The first batch of the configured data, and its number of classes."""
    dataset, _ = open_datasets(config)
    stream = open_pipeline(config, dataset, device, choose_pipeline(config, device)[0])
    return next(iter(stream)).to(device), len(dataset.classes)


def providers(config: Config, num_classes: int, device: torch.device, chosen: str) -> dict[str, Callable[[], Any]]:
    """Factories of steps by name; `chosen`: "all", "main" (no ablation) or "ours"."""

    def ours(overrides: list[str]) -> Callable[[], Any]:
        values = dict(item.removeprefix("run.").split("=") for item in overrides)
        own = replace(config, run=replace(config.run, **values))
        if own.run.engine == "plain":
            return lambda: Engine(own, num_classes, device).step
        return lambda: FusedEngine(own, num_classes, device).step

    found: dict[str, Callable[[], Any]] = {"ours": ours([])}
    if chosen in ("all", "main"):
        found["baseline"] = lambda: Baseline(config, num_classes, device, bf16=False, compiled=False).step
    if chosen == "all":
        if device.type == "cuda":
            found["baseline, bf16 + compile"] = lambda: (
                Baseline(config, num_classes, device, bf16=True, compiled=True).step
            )
        on_gpu = device.type == "cuda"
        wanted = ABLATIONS if on_gpu else {"ours, plain engine": ABLATIONS["ours, plain engine"]}
        found |= {name: ours(overrides) for name, overrides in wanted.items()}
    return found


def compare(
    steps: dict[str, Callable[[], Any]], device: torch.device, windows: int, per_window: int
) -> dict[str, Timing]:
    """Time every step in turns: `windows` windows of `per_window` steps each, after as many steps to warm up."""
    timings = {name: Timing() for name in steps}
    alive: dict[str, Callable[[], Any]] = {}
    for name, make in steps.items():
        try:
            alive[name] = make()
            _reset_peak(device)
            _window(alive[name], device, max(per_window, 5 if device.type == "cuda" else 1))
            timings[name].peak_bytes = _peak(device)
        except (RuntimeError, ValueError) as error:  # the others are still worth measuring
            timings[name].error = str(error).split("\n")[0]
            alive.pop(name, None)
    for _ in range(windows):
        for name, step in alive.items():
            timings[name].milliseconds.append(_window(step, device, per_window) / per_window)
    return timings


def _window(step: Callable[[], Any], device: torch.device, count: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def _reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def flops_of(config: Config, num_classes: int, device: torch.device, batch: Batch) -> float:
    """Floating-point operations of one step, forward and backward, by torch's own count of matrix operations."""
    plain = replace(config, run=replace(config.run, compile="off", capture="off", backend="auto"))
    engine = FusedEngine(plain, num_classes, device)
    with FlopCounterMode(display=False) as counter:
        engine.run(batch)
    return float(counter.get_total_flops())


def whole_steps(config: Config, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Compare the providers for one configuration; its first step already co-trains."""
    config = replace(config, optim=replace(config.optim, cotrain_after=0))
    if arguments.data == "real":
        batch, num_classes = real_batch(config, device)
    else:
        num_classes = arguments.classes
        batch = synthetic_batch(config, num_classes, device)
    factories = providers(config, num_classes, device, arguments.providers)
    steps = {name: _bound(make, batch) for name, make in factories.items()}
    flops = flops_of(config, num_classes, device, batch)
    timings = compare(steps, device, arguments.windows, arguments.steps)
    return {
        "batch_size": config.optim.batch_size, "backbone": config.model.backbone, "crop": config.data.crop_size,
        "classes": num_classes, "data": arguments.data, "gflop_per_step": flops / 1e9,
        "providers": {name: timing.summary(config.optim.batch_size, flops) for name, timing in timings.items()},
        "phases_ms": phase_times(config, num_classes, device, batch, arguments.steps),
    }  # fmt: skip


def loss_paths(config: Config, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Compare the way from network outputs to gradients."""
    batch = synthetic_batch(config, arguments.classes, device)
    paths = {"ours": fused_losses(config, batch), "baseline": baseline_losses(config, batch)}
    timings = compare({name: lambda path=path: path for name, path in paths.items()}, device, arguments.windows, 1)
    for name, path in paths.items():
        timings[name].peak_bytes = extra_memory(path, device)
    return {
        "batch_size": config.optim.batch_size, "crop": config.data.crop_size, "classes": arguments.classes,
        "providers": {name: timing.summary(config.optim.batch_size, None) for name, timing in timings.items()},
    }  # fmt: skip


def _bound(make: Callable[[], Any], batch: Batch) -> Callable[[], Any]:
    def start() -> Callable[[], Any]:
        step = make()
        return lambda: step(batch)

    return start


def print_table(result: dict[str, Any]) -> None:
    """The providers, slowest last, with their ratio to ours."""
    rows = result["providers"]
    print(", ".join(f"{key} {value}" for key, value in result.items() if isinstance(value, str | int)))
    print(f"{'':28}{'ms/step':>10}{'20%':>9}{'80%':>9}{'img/s':>9}{'ours is':>9}{'peak MiB':>10}")
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("ms", float("inf"))):
        if "error" in row:
            print(f"{name:28}failed: {row['error']}")
            continue
        ratio = f"{row['ms'] / rows['ours']['ms']:.2f}x" if "ms" in rows["ours"] else "-"
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        cells = f"{row['ms']:10.1f}{row['ms_20']:9.1f}{row['ms_80']:9.1f}{row['images_per_second']:9.1f}"
        print(f"{name:28}{cells}{ratio:>9}{peak:>10}")
    if "phases_ms" in result:
        phases = "  ".join(f"{name} {value:.1f}" for name, value in result["phases_ms"].items())
        print(f"phases of ours without capture, ms: {phases}")


def save_chart(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of images per second; skipped, with a line that says so, where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no chart: pip install matplotlib")
        return
    figure, axes = plt.subplots(len(results), 1, figsize=(8, 2.5 * len(results)), squeeze=False)
    for axis, result in zip(axes[:, 0], results, strict=True):
        rows = {name: row for name, row in result["providers"].items() if "ms" in row}
        axis.barh(list(rows), [row["images_per_second"] for row in rows.values()])
        axis.set_xlabel("images per second")
        axis.set_title(f"batch {result['batch_size']}, crop {result['crop']}, {result['classes']} classes", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"written {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python bench/throughput.py", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="voc.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--data", choices=["synthetic", "real"], default="synthetic")
    parser.add_argument("--classes", type=int, default=20, help="of synthetic batches")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="default: optim.batch_size")
    parser.add_argument("--backbones", nargs="+", help="default: model.backbone")
    parser.add_argument("--providers", choices=["all", "main", "ours"], default="all")
    parser.add_argument(
        "--losses-only", action="store_true", help="from network outputs to gradients, without networks"
    )
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="per window")
    parser.add_argument("--out", type=Path, help="JSON; the chart goes beside it")
    arguments = parser.parse_intermixed_args(argv)
    if min(arguments.windows, arguments.steps, arguments.classes) < 1:
        raise UserError("--windows, --steps and --classes must be at least 1")
    # Random weights: how fast a network computes does not depend on them.
    config = load_config(arguments.config, ["model.weights=none", *arguments.overrides])
    device = pick_device(config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    measure = loss_paths if arguments.losses_only else whole_steps
    results = []
    for backbone in arguments.backbones or [config.model.backbone]:
        for size in arguments.batch_sizes or [config.optim.batch_size]:
            one = replace(
                config, optim=replace(config.optim, batch_size=size), model=replace(config.model, backbone=backbone)
            )
            results.append(measure(one, arguments, device))
            print_table(results[-1])
    if device.type == "cpu":
        print(CPU_NOTE)
    if arguments.out is not None:
        machine = manifest.describe(config, device)
        arguments.out.write_text(
            json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8"
        )
        save_chart(results, arguments.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
