"""Everything that wants a GPU, in nine minutes: `bash bench/gpu_check.sh [OUT] [--more] [--dry]`.

Kernels against their definitions; training steps at B = 16 and 4; the losses against torch.compile; every kernel's
time; the usual method; one optimisation at a time switched off; a short training. `--more`: what a further nine minutes
bring: a profile, AN's kinds of attention, evaluation, a larger batch, other backbones, COCO, the tests marked for a
GPU. `--dry` walks through all parts, those of --more too if asked, on a CPU with tiny sizes; its figures mean nothing.

Needs the clone, torch, triton, numpy and timm; the first line says what is missing. Each part has a process and a time
limit of its own. OUT/summary.json holds every figure as soon as it is taken, OUT/gpu_check.tar.gz all logs and files.
The exit status is 1 if a part failed or left no figure.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(ROOT)

from bench.gpu import forks, machine, parts

LEAST = 5.0  # seconds: for less no part is started
# What most parts import, imported once.
SHARED = ("bench.throughput", "bench.kernels", "bench.gpu.correctness", "bench.gpu.summary")


def main(argv: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    started = time.monotonic()
    asked = _parse(argv)
    lacking = machine.absent(machine.NEEDED)
    if lacking:
        return _refuse(
            f"{sys.executable} has no {' '.join(lacking)}; bench/gpu_check.sh needs them (PYTHON=... names another)"
        )
    print(machine.first_line(), flush=True)
    _set_environment(asked.dry)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        folder = Path(name)
        gpu = None if asked.dry else forks.value_of(machine.describe_gpu, folder, 60)
        if gpu is None and not asked.dry:
            return _refuse("torch sees no CUDA device; bench/gpu_check.sh needs one (or --dry)")
        try:
            for module in SHARED:
                importlib.import_module(module)
        except Exception as error:  # whatever an import runs into
            return _refuse(f"{sys.executable} cannot import {module}: {type(error).__name__}: {error}")
        if asked.dry:
            parts.shrink()
        print(f"{gpu['gpu']}, torch {gpu['torch']}, CUDA {gpu['cuda']}" if gpu else "dry run on the CPU", flush=True)
        todo = (parts.more if asked.more else parts.first)(folder, asked.dry)
        return _measure(todo, folder, asked.out, gpu, started + parts.TOTAL)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash bench/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, help="folder; default: bench/results/gpu, with --more gpu_more")
    parser.add_argument("--more", action="store_true", help="what a further nine minutes bring")
    parser.add_argument("--dry", action="store_true", help="walk through on a CPU, with tiny sizes")
    asked = parser.parse_args(argv)
    default = ROOT / "bench" / "results" / ("gpu_more" if asked.more else "gpu")
    asked.out = (asked.out or default).resolve()
    return asked


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _set_environment(dry: bool) -> None:
    """Of this process and all parts: nothing is fetched, children find the clone, and whoever asks during an import
    whether there is a GPU does not open CUDA in the process that forks."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if dry:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _measure(todo: Sequence[parts.Part], folder: Path, out: Path, gpu: dict[str, Any] | None, deadline: float) -> int:
    from bench.gpu.summary import Report

    report = Report(folder, out, gpu)
    signal.signal(signal.SIGTERM, _end)  # from here on an end is an exception, and what there is gets written
    try:
        for part in todo:
            lacking, limit = machine.absent(part.needs), min(part.limit, deadline - time.monotonic())
            if lacking:
                report.left_out(part.name, f"not installed: {' '.join(lacking)}")
            elif limit < LEAST:
                report.left_out(part.name, "no time is left")
            else:
                start = time.monotonic()
                status = forks.run(lambda part=part: _run(part), folder / f"{part.name}.log", limit, report.refresh)
                report.ended(part.name, status, time.monotonic() - start, limit)
    finally:
        report.close()
    return report.status


def _run(part: parts.Part) -> int:
    """In the part's own process."""
    from cosa_fast.errors import UserError

    try:
        return int(importlib.import_module(part.module).main(part.arguments) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
