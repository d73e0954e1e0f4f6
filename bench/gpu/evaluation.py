"""What an evaluated image costs: `python -m bench.gpu.evaluation [--out FILE.json]`.

The published protocol (five scales and the flip, CAMs at AN's scales) on generated images of 448 pixels, ViT-B/16.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.arguments import result_file
from bench.operators.output import machine
from bench.timing import count_launches, seconds_of
from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.synthetic import generate
from cosa_fast.device import pick_device
from cosa_fast.evaluation.evaluator import Evaluator
from cosa_fast.files import write_json
from cosa_fast.network.build import build_model

TINY = [
    "model.backbone=vit_tiny_patch16_224", "model.arguments={embed_dim: 48, depth: 3, num_heads: 3}",
    "model.decoder_width=16", "eval.scales=[1.0]", "run.device=cpu",
]  # fmt: skip


def measure(tiny: bool, images: int = 16) -> dict[str, Any]:
    """Milliseconds and launches per image, one network."""
    config = load_config("voc.yaml", ["model.weights=none", "eval.coexistence=[]", *(TINY if tiny else [])])
    device = pick_device(config.run.device)
    images, size = (1, 64) if tiny else (images, 448)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder) / "set", train=1, val=images, size=size)
        dataset = open_dataset("synthetic", folder + "/set", "val")
        network = build_model(config.model, len(dataset.classes)).to(device).eval()
        evaluator = Evaluator(config, dataset.classes, device)

        def run() -> None:
            evaluator.evaluate(network, dataset)

        run()  # warms up
        seconds = seconds_of(run, device)
        launches = count_launches(run) if device.type == "cuda" else None
    return {
        "machine": machine(device), "images": images, "size": size, "scales": config.eval.scales,
        "ms_per_image": 1000 * seconds / images,
        "launches_per_image": None if launches is None else launches / images,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="one small image")
    parser.add_argument("--out", type=result_file, help="JSON")
    arguments = parser.parse_args(argv)
    results = measure(arguments.tiny)
    if arguments.out:
        write_json(arguments.out, results)
    print(f"{results['ms_per_image']:.1f} ms per image, {results['launches_per_image']} launches per image")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
