"""Where the device's time goes, kernel by kernel: `python -m bench.gpu.profile CONFIG [key=value ...] [--out FILE]`.

A few uncaptured co-training steps under torch.profiler: captured ones show the same kernels without their phase.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.arguments import result_file, split_settings
from bench.operators.output import machine
from bench.steps.providers import class_count, synthetic_batch
from bench.tables import aligned
from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.device import pick_device
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.files import write_json

STEPS = 3
SHOWN = 40


def measure(settings: list[str], batch_size: int) -> dict[str, Any]:
    """Per kernel: calls and microseconds of one step, the longest first."""
    (name,), overrides = split_settings(settings)
    fixed = ["model.weights=none", "optim.cotrain_after=0", "run.capture=off", f"optim.batch_size={batch_size}"]
    config = load_config(name, [*overrides, *fixed])
    device = pick_device(config.run.device)
    classes = class_count(config, None)
    engine, batch = FusedEngine(config, classes, device), synthetic_batch(config, classes, device)
    for _ in range(STEPS):
        engine.step(batch)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            engine.step(batch)
        if on_gpu:
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [
        {"name": event.key, "calls": event.count / STEPS, "microseconds": getattr(event, time_of) / STEPS}
        for event in found.key_averages()
    ]
    rows = sorted((row for row in rows if row["microseconds"] > 0), key=lambda row: -row["microseconds"])
    return {"machine": machine(device), "batch_size": batch_size, "kernels": rows}


def main(argv: list[str] | None = None) -> int:
    """Profile; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.profile", description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="+", metavar="CONFIG | key=value")
    parser.add_argument("--tiny", action="store_true", help="a batch of 2")
    parser.add_argument("--out", type=result_file, help="JSON")
    arguments = parser.parse_intermixed_args(argv)
    results = measure(arguments.settings, 2 if arguments.tiny else 16)
    if arguments.out:
        write_json(arguments.out, results)
    lines = [
        [row["name"][:90], f"{row['calls']:.0f}", f"{row['microseconds']:.1f}"] for row in results["kernels"][:SHOWN]
    ]
    print(aligned(["of one step", "calls", "µs"], lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
