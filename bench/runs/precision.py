"""How far bfloat16 strays from float32: `python -m bench.runs.precision [CONFIG [key=value ...]] [--out FILE]`.

Two fused engines, alike but for run.precision, learn from the same batches of the configured data in turns. Compared
are the means of every loss term over windows of iterations, and at the end the evaluation of AN. Single steps differ by
rounding and then by chance; the means of windows tell whether the curves are the same.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch

from bench.arguments import result_file
from bench.tables import TERMS, aligned
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.device import pick_device
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.errors import UserError
from cosa_fast.evaluation.evaluator import Evaluator
from cosa_fast.files import write_json
from cosa_fast.run import manifest
from cosa_fast.run.data import open_datasets

PRECISIONS = ("fp32", "bf16")
Curves = dict[str, list[dict[str, float]]]


def train_both(config: Config, dataset: ImageDataset, device: torch.device) -> tuple[dict[str, FusedEngine], Curves]:
    """Both engines after all iterations, and the metrics of each step."""
    engines = {
        name: FusedEngine(replace(config, run=replace(config.run, precision=name)), len(dataset.classes), device)  # type: ignore[arg-type]
        for name in PRECISIONS
    }
    stream = iter(
        TorchPipeline(dataset, config.data, config.optim.batch_size, config.run.seed, workers=config.data.workers)
    )
    curves: Curves = {name: [] for name in PRECISIONS}
    for iteration in range(1, config.optim.iterations + 1):
        batch = next(stream).to(device)
        for name, engine in engines.items():
            metrics = engine.step(batch)
            engine.check()
            curves[name].append({term: float(metrics[term]) for term in TERMS if term in metrics})
        if iteration % config.run.log_every == 0:
            print(iteration, {name: round(curve[-1]["loss"], 4) for name, curve in curves.items()}, flush=True)
    return engines, curves


def windows(curve: list[dict[str, float]], term: str, length: int, start: int) -> list[float]:
    """Means of a term over consecutive windows of `length` iterations, from iteration `start` on."""
    values = [step[term] for step in curve[start:] if term in step]
    return [statistics.fmean(values[i : i + length]) for i in range(0, len(values) - length + 1, length)]


def compare(curves: Curves, length: int, start: int) -> dict[str, dict[str, Any]]:
    """Per term: window means of both, and the largest and the median difference relative to fp32's mean over all."""
    result = {}
    for term in TERMS:
        single, half = (windows(curves[name], term, length, start) for name in PRECISIONS)
        if not single:
            continue
        scale = statistics.fmean(single)
        differences = [abs(a - b) / scale for a, b in zip(single, half, strict=True)]
        result[term] = {
            "fp32": single, "bf16": half,
            "largest_difference": max(differences), "median_difference": statistics.median(differences),
        }  # fmt: skip
    return result


def evaluate(engine: FusedEngine, config: Config, dataset: ImageDataset, device: torch.device) -> dict[str, float]:
    """AN's summary on eval.limit images."""
    single = replace(config, run=replace(config.run, precision="fp32"))
    evaluator = Evaluator(single, dataset.classes, device)
    return evaluator.evaluate(engine.an.master, dataset, limit=config.eval.limit).summary()


def compare_phases(config: Config, curves: Curves, length: int) -> dict[str, dict[str, Any]]:
    """`compare` before and after the start of co-training, where that is at least one window."""
    bounds = (0, config.optim.cotrain_after, config.optim.iterations)
    compared = {}
    for phase, start, end in (("classification", *bounds[:2]), ("co-training", *bounds[1:])):
        if end - start >= length:
            compared[phase] = compare({name: curve[:end] for name, curve in curves.items()}, length, start)
    return compared


def print_tables(phases: dict[str, dict[str, Any]], evaluation: dict[str, dict[str, float]]) -> None:
    """How far the terms differ in each phase, and both evaluations."""
    print("difference of window means, relative to the term's mean")
    lines = [
        [phase, name, f"{row['largest_difference']:.2%}", f"{row['median_difference']:.2%}"]
        for phase, terms in phases.items()
        for name, row in terms.items()
    ]
    print(aligned(["", "", "largest", "median"], lines, words=2))
    for name, summary in evaluation.items():
        seg, cam = summary["seg_label_free"], summary["cam_best"]
        print(f"{name}: seg label-free {seg:.1f}, CAM at best threshold {cam:.1f}")


def main(argv: list[str] | None = None) -> int:
    """Train twice and compare; returns the exit status."""
    parser = CommandLine(prog="python -m bench.runs.precision", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="voc.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--window", type=int, default=20, help="iterations of a mean")
    parser.add_argument("--out", type=result_file)
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    if not 1 <= arguments.window <= config.optim.iterations:
        raise UserError(f"--window {arguments.window}: give 1 to optim.iterations = {config.optim.iterations}")
    device = pick_device(config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    machine = manifest.describe(config, device)
    training_set, validation_set = open_datasets(config)
    engines, curves = train_both(config, training_set, device)
    evaluation = {name: evaluate(engine, config, validation_set, device) for name, engine in engines.items()}
    phases = compare_phases(config, curves, arguments.window)
    print_tables(phases, evaluation)
    if arguments.out is not None:
        result = {
            "machine": machine, "iterations": config.optim.iterations,
            "cotrain_after": config.optim.cotrain_after, "batch_size": config.optim.batch_size,
            "backbone": config.model.backbone, "crop": config.data.crop_size, "window": arguments.window,
            "phases": phases, "evaluation": evaluation,
        }  # fmt: skip
        write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
