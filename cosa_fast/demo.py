"""The demo: `python -m cosa_fast.demo`. CoSA on generated images, beside what CAMs alone reach with the same budget."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config

if TYPE_CHECKING:
    from cosa_fast.run.training import Summary


def baseline(config: Config) -> Config:
    """The same schedule with the classification losses alone: its CAMs are the classical pseudo-labels."""
    return replace(
        config,
        optim=replace(config.optim, cotrain_after=config.optim.iterations),
        run=replace(config.run, name=f"{config.run.name}_cam_only"),
    )


def report(cosa: Summary, cam_only: Summary) -> str:
    """The figures side by side, mIoU in percent."""
    figures = {name: result.summary() for name, result in cosa.results.items()}
    cam = cam_only.results["on"].summary()
    rows = [
        ("CoSA, online network (ON)", "label-free", figures["on"]["seg_label_free"]),
        ("CoSA, assignment network (AN)", "label-free", figures["an"]["seg_label_free"]),
        (
            "CAMs alone, same iterations",
            "label-free, best threshold",
            cam["cam_label_free_best"],
        ),
        ("", "told the image labels, best threshold", cam["cam_best"]),
    ]
    lines = [f"{name:32} {value:5.1f}   ({condition})" for name, condition, value in rows]
    return "\n".join([f"mIoU in percent on {cosa.results['an'].extent} of the demo's validation set", *lines])


def main(argv: list[str] | None = None) -> int:
    """Train the demo and its baseline from scratch; returns the exit status."""
    parser = CommandLine(prog="python -m cosa_fast.demo", description="Train CoSA on generated images.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    config = load_config("demo.yaml", parser.parse_args(argv).overrides)
    from cosa_fast.report.page import write
    from cosa_fast.run.training import train  # here, where signals are obeyed: it takes seconds

    started = time.perf_counter()
    print("CAMs alone", flush=True)
    cam_only = train(baseline(config), overwrite=True, report=write)
    if not cam_only.results:
        return 0  # stopped by a signal: the checkpoint is saved, there is nothing to compare
    print("CoSA", flush=True)
    cosa = train(config, overwrite=True, report=write)
    if not cosa.results:
        return 0
    print(f"\n{report(cosa, cam_only)}\n")
    print(f"report: {cosa.folder.report}   ({time.perf_counter() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
