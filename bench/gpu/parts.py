"""What gpu_check.sh measures, in the order of its worth, so that what a limit cuts off is the least wanted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

TOTAL = 525.0  # seconds for all parts of one call, imports included
# A dry run's network, batches and training: a walk through every part, whose figures mean nothing.
TINY = [
    "model.backbone=vit_tiny_patch16_224", "data.crop_size=64", "teacher.scales=[1.0]", "run.device=cpu",
    "run.threads=1", "threshold.queue_length=4", "model.decoder_width=16",
    "model.arguments={embed_dim: 48, depth: 3, num_heads: 3}",
]  # fmt: skip


def shrink() -> None:
    """Before a dry run, in its process: what no option makes smaller."""
    from bench.operators import cases
    from bench.steps import comparison

    cases.PARAMETERS = 10_000
    comparison.SIDES["cpu"] = (64,)


@dataclass(frozen=True)
class Part:
    """`main` of a module with its arguments, and the seconds it may take. `needs`: modules without which it is left
    out."""

    name: str
    module: str
    arguments: list[str]
    limit: float
    needs: tuple[str, ...] = ()


def _throughput(
    folder: Path, dry: bool, name: str, limit: float, budget: float, *arguments: str, needs: tuple[str, ...] = ()
) -> Part:
    windows = ["--windows", "1", "--steps", "1"] if dry else ["--windows", "3", "--steps", "4"]
    out = ["--no-chart", "--budget", str(budget), "--out", str(folder / f"{name}.json")]
    return Part(name, "bench.throughput", [*arguments, *windows, *out], limit, needs)


def first(folder: Path, dry: bool) -> list[Part]:
    """The first nine minutes. Every part writes folder/NAME.json as it goes on."""
    tiny = ["--tiny"] if dry else []
    voc, coco = (["voc.yaml", *TINY], []) if dry else (["voc.yaml"], ["coco.yaml"])
    sizes, full = (["2", "1"], ["2"]) if dry else (["16", "4"], ["16"])
    throughput = partial(_throughput, folder, dry)

    kernels = ["--tiny", "--operators", "perplexity", "histogram"] if dry else ["--quick"]
    return [
        Part(
            "correctness", "bench.gpu.correctness",
            [*tiny, "--budget", "75", "--out", str(folder / "correctness.json")], 90,
        ),
        throughput("steps", 120, 95, *voc, "--providers", "quick", "--batch-sizes", *sizes),
        throughput("losses", 60, 40, *voc, *coco, "--losses-only", "--batch-sizes", *full),
        Part(
            "kernels", "bench.kernels",
            [*kernels, "--no-chart", "--budget", "70", "--out", str(folder / "kernels.json")], 85,
        ),
        throughput("baseline", 45, 25, *voc, "--providers", "baseline", "--batch-sizes", *sizes, needs=("sklearn",)),
        throughput("ablations", 70, 50, *voc, "--providers", "ablations", "--batch-sizes", *full),
        Part(
            "training", "bench.gpu.training",
            [str(folder), *(tiny or ["run.device=cuda"])], 55,
            ("tensorboard",),
        ),
    ]  # fmt: skip


def more(folder: Path, dry: bool) -> list[Part]:
    """What a further nine minutes bring."""
    tiny = ["--tiny"] if dry else []
    voc, coco = (["voc.yaml", *TINY], ["coco.yaml", *TINY]) if dry else (["voc.yaml"], ["coco.yaml"])
    backbones = [] if dry else ["--backbones", "vit_small_patch16_224", "vit_large_patch16_224"]
    full, large = ("1", "2") if dry else ("16", "32")

    throughput = partial(_throughput, folder, dry)

    def own(name: str, limit: float, *arguments: str, needs: tuple[str, ...] = ()) -> Part:
        return Part(name, f"bench.gpu.{name}", [*tiny, *arguments, "--out", str(folder / f"{name}.json")], limit, needs)

    return [
        own("profile", 45, *(["voc.yaml", *TINY] if dry else ["voc.yaml"])),
        # Kernels compare as well between uncompiled blocks, and each compilation would cost as much as its figure.
        throughput("attention", 90, 65, *voc, "run.compile=off", "--attention", "--batch-sizes", full),
        own("evaluation", 60),
        throughput("large", 45, 25, *voc, "--providers", "ours", "--batch-sizes", large),
        throughput("backbones", 80, 50, *voc, "--providers", "ours", "--batch-sizes", full, *backbones),
        throughput("coco", 60, 40, *coco, "--providers", "ours", "--batch-sizes", full),
        own("tests", 140, needs=("pytest", "hypothesis")),
    ]  # fmt: skip
