"""The demo trained on this machine: `python -m bench.gpu.training FOLDER [key=value ...]` → FOLDER/training.json."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bench.runs.reading import read_run
from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.data_pipeline.datasets.synthetic import generate
from cosa_fast.files import read_json, write_json
from cosa_fast.run.training import train

TINY = [
    "optim.iterations=2", "optim.cotrain_after=1", "optim.batch_size=2", "data.workers=0", "data.crop_size=64",
    "model.arguments.img_size=64", "model.arguments.depth=2", "model.arguments.embed_dim=48", "run.log_every=1",
    "eval.scales=[1.0]", "run.threads=1", "run.device=cpu",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    folder, *overrides = sys.argv[1:] if argv is None else argv
    tiny = "--tiny" in overrides
    overrides = [*(TINY if tiny else []), *(each for each in overrides if each != "--tiny")]
    runs, data = Path(folder) / "runs", f"data.root={Path(folder) / 'demo'}"
    if tiny:
        generate(Path(folder) / "demo", train=2, val=1, size=64)
    started = time.perf_counter()
    config = load_config("demo.yaml", [data, *overrides, "run.name=gpu_check", f"run.output={runs}"])
    train(config, overwrite=True)
    run = read_run(runs / "gpu_check")
    last = run.training[-1]
    write_json(
        Path(folder) / "training.json",
        {
            "seconds": time.perf_counter() - started,
            "images_per_second": last.get("images_per_second"),
            "last_record": last,
            "results": read_json(runs / "gpu_check" / "results.json"),
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
