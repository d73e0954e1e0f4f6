"""Behind bench/throughput.py: every configuration with all of its providers, as a table, a chart and a dictionary."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.steps.comparison import Plan, Windows, attempt, compare, matrix_rate, release
from bench.steps.loss_path import baseline_losses, fused_losses
from bench.steps.phases import phase_times
from bench.steps.providers import (
    Feed,
    OneBatch,
    RealBatches,
    Step,
    attention_providers,
    changed,
    class_count,
    providers,
    synthetic_batch,
)
from bench.tables import number, print_providers, save_bars
from bench.timing import Run, captured, extra_memory
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
    (see `providers`) or, with `attention`, by which kernels for it (see `attention_providers`); `windows` windows of
    `steps` steps; no provider starts after `deadline` (time.monotonic). `classes`: of generated batches."""

    losses_only: bool
    real_data: bool
    classes: int | None
    providers: str
    attention: tuple[str, ...] | None
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
    """All results so far, after each figure; the table of every configuration at its end. The first configuration
    decides device and threads.

    Where providers do not take turns, the most wanted one is timed at every configuration, then the next: what a
    deadline cuts off is the least wanted.
    """
    run = configs[0].run
    device = pick_device(run.device)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    rate = None if options.losses_only else matrix_rate(device, compute_type(run.precision, device))
    if rate is not None:
        print(f"matrix rate: {rate['flop_per_second'] / 1e12:.3g} TFLOP/s in {rate['type']}, side {rate['side']}")
    machine = manifest.describe(configs[0], device)
    kind = LossPaths if options.losses_only else WholeSteps
    cases = [kind(config, device, options, None if rate is None else rate["flop_per_second"]) for config in configs]
    shown: set[int] = set()
    for index, measure in _in_order(cases, options.plan(device, 1).turns):
        measure()
        if cases[index].complete and index not in shown:
            shown.add(index)
            print_table(cases[index].result())
        yield {"machine": machine, "matrix_rate": rate, "results": [case.result() for case in cases if case.timings]}
    if not (options.real_data or options.losses_only):
        print("no data wait: every step got the same generated batch")
    if device.type == "cpu":
        print(CPU_NOTE)


def _in_order(cases: Sequence[_Case], turns: bool) -> Iterator[tuple[int, Callable[[], None]]]:
    """(which case, what to measure of it next)."""
    if turns:
        for index, case in enumerate(cases):
            yield index, partial(case.measure, list(case.makers))
            yield index, case.finish
        return
    for name in dict.fromkeys(name for case in cases for name in case.makers):
        for index, case in enumerate(cases):
            if name in case.makers:
                yield index, partial(case.measure, [name])
    for index, case in enumerate(cases):
        yield index, case.finish


class _Case(ABC):
    """One configuration: its providers, and what is known of them so far."""

    def __init__(self, config: Config, device: torch.device, options: Options) -> None:
        self.config, self.device, self.options = config, device, options
        self.timings: dict[str, Windows] = {}
        self.makers: dict[str, Callable[[], Step]] = {}
        self.complete = False

    def measure(self, names: list[str]) -> None:
        """Time these providers."""
        makers = {name: self.makers[name] for name in names}
        self.timings |= compare(makers, self.feed, self.options.plan(self.device, self.steps))

    @property
    @abstractmethod
    def steps(self) -> int:
        """Of a window."""

    @abstractmethod
    def feed(self) -> Feed:
        """The batches of one provider."""

    @abstractmethod
    def finish(self) -> None:
        """What is measured after the providers."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """What is known so far."""

    def _noted(self, found: dict[str, Any]) -> dict[str, Any]:
        return found | ({"note": ENERGY_NOTE} if self.config.loss.energy > 0 else {})


class WholeSteps(_Case):
    """Whole steps; the first one already co-trains. `rate`: FLOP per second of the machine's matrix products."""

    def __init__(self, config: Config, device: torch.device, options: Options, rate: float | None) -> None:
        super().__init__(changed(config, ["optim.cotrain_after=0"]), device, options)
        # What the user can mend shows here; later on whatever goes wrong is a provider's.
        check_backend(config.run.backend, device)
        self._batch, self._classes = _first_batch(self.config, device, options)
        self._flops = _flops(self.config, self._classes)
        self._rate = rate
        self._phases: dict[str, float] | None = None
        shared = (self.config, self._classes, device)
        if options.attention is None:
            self.makers = providers(*shared, options.providers)
        else:
            self.makers = attention_providers(*shared, options.attention)

    @property
    def steps(self) -> int:
        return self.options.steps

    def feed(self) -> Feed:
        return RealBatches(self.config, self.device) if self.options.real_data else OneBatch(self._batch)

    def finish(self) -> None:
        """The phases of a step of ours."""
        self.complete = True
        if "ours" in self.makers and time.monotonic() < self.options.deadline:
            asked = (self.config, self._classes, self.device, self._batch, self.options.steps)
            self._phases = attempt(Windows(), phase_times, *asked)
            release(self.device)

    def result(self) -> dict[str, Any]:
        config = self.config
        rows = {
            name: timing.summary(config.optim.batch_size, self._flops, self._rate)
            for name, timing in self.timings.items()
        }
        phases, ours = self._phases, rows.get("ours", {})
        if phases is not None and self.options.real_data and "data_wait_ms" in ours:
            phases = {"data wait": ours["data_wait_ms"], **phases}
        found = {
            "batch_size": config.optim.batch_size, "backbone": config.model.backbone, "crop": config.data.crop_size,
            "classes": self._classes, "data": "real" if self.options.real_data else "synthetic",
            "gflop_per_step": None if self._flops is None else self._flops / 1e9, "providers": rows,
            "phases_ms": phases,
        }  # fmt: skip
        return self._noted(found)


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


class LossPaths(_Case):
    """The way from network outputs to gradients."""

    steps = 1

    def __init__(self, config: Config, device: torch.device, options: Options, rate: float | None) -> None:
        super().__init__(config, device, options)
        self._classes = class_count(config, options.classes)
        self._batch = batch = synthetic_batch(config, self._classes, device)
        self._paths: dict[str, Callable[[], Run]] = {"ours": lambda: fused_losses(config, batch)}
        if device.type == "cuda":
            plain = changed(config, ["run.backend=reference"])
            self._paths |= {
                "ours, CUDA graph": lambda: captured(lambda: fused_losses(config, batch)),
                "plain kernels, compiled": lambda: fused_losses(plain, batch, compiled=True),
                "plain kernels": lambda: fused_losses(plain, batch),
            }
        self._paths["baseline"] = lambda: baseline_losses(config, batch)
        self.makers = {name: lambda make=make: _without_batch(make()) for name, make in self._paths.items()}

    def feed(self) -> Feed:
        return OneBatch(self._batch)

    def measure(self, names: list[str]) -> None:
        """Their times, then their memory."""
        super().measure(names)
        for name in names:
            # A graph's memory stays with it, and no statistics of the allocator show it.
            if self.timings[name].error is None and name != "ours, CUDA graph":
                self.timings[name].peak_bytes = attempt(self.timings[name], _memory, self._paths[name], self.device)

    def finish(self) -> None:
        self.complete = True

    def result(self) -> dict[str, Any]:
        size = self.config.optim.batch_size
        rows = {name: timing.summary(size, None, None) for name, timing in self.timings.items()}
        found = {"batch_size": size, "crop": self.config.data.crop_size, "classes": self._classes, "providers": rows}
        return self._noted(found)


def _without_batch(path: Run) -> Step:
    return lambda _: path()


def _memory(make: Callable[[], Run], device: torch.device) -> int:
    path = make()
    if device.type == "cuda":
        path()  # compilation and first use are not part of it
    return extra_memory(path, device)


def print_table(result: dict[str, Any]) -> None:
    """The providers, slowest last, with their ratio to ours."""
    facts = {key: value for key, value in result.items() if isinstance(value, str | int) and key != "note"}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    ours = result["providers"].get("ours", {}).get("ms")

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
    for name, row in result["providers"].items():
        if "not_captured" in row:
            print(f"{name}: not captured in a CUDA graph: {row['not_captured']}")
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
