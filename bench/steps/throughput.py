"""Behind bench/throughput.py: every configuration with all of its providers, as a table, a chart and a dictionary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.steps.comparison import Plan, Windows, attempt, compare, matrix_rate, release
from bench.steps.loss_path import baseline_losses, fused_losses
from bench.steps.phases import phase_times
from bench.steps.providers import Feed, OneBatch, RealBatches, changed, class_count, providers, synthetic_batch
from bench.tables import number, print_providers, save_bars
from bench.timing import extra_memory
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import compute_type, pick_device
from cosa_fast.engine.base import check_backend
from cosa_fast.engine.flops import UncountableError, step_flops
from cosa_fast.network.build import build_model
from cosa_fast.run import manifest

COLUMNS = ("ms/step", "20%", "80%", "img/s", "ours is", "wait ms", "TFLOP/s", "of rate", "peak MiB")
CPU_NOTE = "Figures of a CPU compare providers within this run; they say nothing about a GPU."
ENERGY_NOTE = (
    "The baseline filters its energy on a lattice: approximate, and NumPy where the authors have C++. The step's ratio "
    "contains that."
)


@dataclass(frozen=True)
class Options:
    """What is compared, and how: whole steps or the losses alone, on generated or real batches, with which providers
    (see `providers`); `windows` windows of `steps` steps; no provider starts after `deadline` (time.monotonic).
    `classes`: of generated batches."""

    losses_only: bool
    real_data: bool
    classes: int | None
    providers: str
    windows: int
    steps: int
    deadline: float

    def plan(self, device: torch.device, steps: int) -> Plan:
        """How to time on a device."""
        turns = device.type == "cpu" and not self.real_data
        return Plan(device, self.windows, steps, turns, self.deadline)


def grid(
    names: Sequence[str], overrides: list[str], backbones: Sequence[str] | None, sizes: Sequence[int] | None
) -> Iterator[Config]:
    """The configurations to compare: every file with every backbone and batch size (None: its own)."""
    for name in names:
        # Random weights: how fast a network computes does not depend on them.
        config = load_config(name, ["model.weights=none", *overrides])
        for backbone in backbones or [config.model.backbone]:
            for size in sizes or [config.optim.batch_size]:
                yield changed(config, [f"model.backbone={backbone}", f"optim.batch_size={size}"])


def measure_all(configs: Sequence[Config], options: Options) -> Iterator[dict[str, Any]]:
    """Print the table of every configuration; after each, all results so far. The first decides device and threads."""
    run = configs[0].run
    device = pick_device(run.device)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    rate = None if options.losses_only else matrix_rate(device, compute_type(run.precision, device))
    if rate is not None:
        print(f"matrix rate: {rate['flop_per_second'] / 1e12:.3g} TFLOP/s in {rate['type']}, side {rate['side']}")
    machine, results = manifest.describe(configs[0], device), []
    for config in configs:
        if options.losses_only:
            found = loss_paths(config, device, options)
        else:
            found = whole_steps(config, device, options, None if rate is None else rate["flop_per_second"])
        if config.loss.energy > 0:
            found["note"] = ENERGY_NOTE
        print_table(found)
        results.append(found)
        yield {"machine": machine, "matrix_rate": rate, "results": results}
    if not (options.real_data or options.losses_only):
        print("no data wait: every step got the same generated batch")
    if device.type == "cpu":
        print(CPU_NOTE)


def whole_steps(config: Config, device: torch.device, options: Options, rate: float | None) -> dict[str, Any]:
    """Compare the providers for one configuration; its first step already co-trains. `rate`: FLOP per second of the
    machine's matrix products."""
    config = changed(config, ["optim.cotrain_after=0"])
    # What the user can mend shows here; later on whatever goes wrong is a provider's.
    check_backend(config.run.backend, device)
    batch, num_classes = _first_batch(config, device, options)
    flops = _flops(config, num_classes)

    def feed() -> Feed:
        return RealBatches(config, device) if options.real_data else OneBatch(batch)

    makers = providers(config, num_classes, device, options.providers)
    timings = compare(makers, feed, options.plan(device, options.steps))
    phases = None
    if time.monotonic() < options.deadline:
        phases = attempt(Windows(), phase_times, config, num_classes, device, batch, options.steps)
        release(device)
    size = config.optim.batch_size
    rows = {name: timing.summary(size, flops, rate) for name, timing in timings.items()}
    if phases is not None and options.real_data and timings["ours"].error is None:
        phases = {"data wait": rows["ours"]["data_wait_ms"], **phases}
    return {
        "batch_size": size, "backbone": config.model.backbone, "crop": config.data.crop_size,
        "classes": num_classes, "data": "real" if options.real_data else "synthetic",
        "gflop_per_step": None if flops is None else flops / 1e9, "providers": rows, "phases_ms": phases,
    }  # fmt: skip


def _flops(config: Config, num_classes: int) -> int | None:
    try:
        return step_flops(build_model(config.model, num_classes), config, cotraining=True)
    except UncountableError as error:
        print(f"no TFLOP/s: {error}")
        return None


def _first_batch(config: Config, device: torch.device, options: Options) -> tuple[Batch, int]:
    """A batch and its number of classes."""
    if options.real_data:
        stream = RealBatches(config, device)
        return stream.next(), stream.classes
    num_classes = class_count(config, options.classes)
    return synthetic_batch(config, num_classes, device), num_classes


def loss_paths(config: Config, device: torch.device, options: Options) -> dict[str, Any]:
    """Compare the way from network outputs to gradients."""
    size, num_classes = config.optim.batch_size, class_count(config, options.classes)
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
    timings = compare(steps, lambda: OneBatch(batch), options.plan(device, 1))
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


def print_table(result: dict[str, Any]) -> None:
    """The providers, slowest last, with their ratio to ours."""
    facts = {key: value for key, value in result.items() if isinstance(value, str | int) and key != "note"}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    ours = result["providers"]["ours"].get("ms")

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            *(f"{row[key]:.1f}" for key in ("ms", "ms_20", "ms_80", "images_per_second")),
            number(None if ours is None else row["ms"] / ours, ".2f"),
            f"{row['data_wait_ms']:.1f}",
            number(row["tflop_per_second"], ".3g"),
            number(row["share_of_matrix_rate"], ".0%"),
            number(row["peak_mib"], ".0f"),
        ]

    print_providers(COLUMNS, result["providers"], cells)
    if result.get("phases_ms"):
        phases = "  ".join(f"{name} {value:.1f}" for name, value in result["phases_ms"].items())
        print(f"phases of ours without capture, ms: {phases}")
    if "note" in result:
        print(result["note"])


def save_chart(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of images per second, a panel for each result."""

    def title(result: dict[str, Any]) -> str:
        parts = (result.get("backbone", "loss path"), f"batch {result['batch_size']}", f"crop {result['crop']}")
        return ", ".join([*parts, f"{result['classes']} classes"])

    save_bars([(title(result), result["providers"]) for result in results], path)
