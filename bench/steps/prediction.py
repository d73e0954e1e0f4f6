"""What a co-training step should take on a GPU, part by part: `python -m bench.steps.prediction [--out FILE.json]`.

Counts of operations, bytes and launches, over rates that such a GPU was seen to reach and shares of them that its
libraries usually do; docs/performance.md has the reasoning. Written before any measurement, to be held against one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.arguments import result_file
from bench.operators.cases import OPERATORS
from bench.operators.limits import Limits
from bench.operators.scene import VOC, Size
from bench.tables import aligned
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.files import write_json

CROP, PATCH, SCALES = 448, 16, (1.0, 0.5, 1.5)
DECODER, TAPS = 512, 9
TILE = (128, 256)  # of a matrix kernel's result, one on a multiprocessor at a time
HALF = 2  # bytes of a bfloat16 value
LAUNCH = 1.2e-6  # seconds from a kernel to the next in a graph
# Of the matrix rate that one large product reaches: shares of products, of convolutions with dilation, of attention
# forward and backward. Of the bandwidth of one large copy: element-wise work.
LINEAR, DILATED, ATTENTION, ATTENTION_BACKWARD, STREAM = 0.9, 0.6, 0.5, 0.4, 0.85
KERNELS = 2.0  # times its limit that each of our kernels may take (DESIGN's target for them)
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Gpu:
    """Rates seen on one such machine: FLOP/s of an 8192-wide bfloat16 product, bytes/s of a copy, read and written."""

    name: str
    matrix: float
    bandwidth: float


GPUS = (Gpu("H100", 798e12, 3.0e12), Gpu("H200", 788e12, 4.3e12))


@dataclass(frozen=True)
class Vit:
    """A plain ViT's sizes; MLPs are four times as wide."""

    name: str
    width: int
    depth: int
    heads: int


VITS = (Vit("ViT-S/16", 384, 12, 6), Vit("ViT-B/16", 768, 12, 12), Vit("ViT-L/16", 1024, 24, 16))


@dataclass(frozen=True)
class Part:
    """One line of the prediction: of which phase, operations, bytes, launches, seconds."""

    phase: str
    name: str
    flops: float
    bytes: float
    launches: int
    seconds: float


def product_seconds(rows: int, inner: int, columns: int, share: float, gpu: Gpu) -> float:
    """A matrix product (rows, inner) × (inner, columns): its last wave of tiles is as long as a full one."""
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    waves = math.ceil(tiles / MULTIPROCESSORS)
    padded = 2.0 * waves * MULTIPROCESSORS * TILE[0] * TILE[1] * inner
    moved = HALF * (rows * inner + inner * columns + rows * columns)
    return max(padded / (gpu.matrix * share), moved / gpu.bandwidth)


def forward(phase: str, vit: Vit, images: int, side: int, gpu: Gpu) -> Iterator[Part]:
    """The parts of one forward pass over `images` of `side` pixels."""
    tokens = images * ((side // PATCH) ** 2 + 1)
    width, patches = vit.width, (side // PATCH) ** 2 * images
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * vit.depth
    linears = [(tokens, *shape) for shape in shapes] + [(patches, 3 * PATCH**2, width)]
    flops = sum(2.0 * m * k * n for m, k, n in linears)
    seconds = sum(product_seconds(*shape, LINEAR, gpu) for shape in linears)
    yield Part(phase, "linears", flops, 0, len(linears), seconds)
    attention = 4.0 * tokens * ((side // PATCH) ** 2 + 1) * width * vit.depth
    yield Part(phase, "attention", attention, 0, vit.depth, attention / (gpu.matrix * ATTENTION))
    # Per block and token: norm (2D), residual and norm (4D), GELU of 4D (8D), residual (3D). Attention reads q, k, v.
    moved = HALF * 17.0 * tokens * width * vit.depth
    yield Part(phase, "element-wise", 0, moved, 4 * vit.depth + 8, moved / (gpu.bandwidth * STREAM))
    fov = 2.0 * patches * TAPS * DECODER * (width + DECODER)
    yield Part(phase, "LargeFOV", fov, 0, 5, fov / (gpu.matrix * DILATED))


def backward(vit: Vit, images: int, gpu: Gpu) -> Iterator[Part]:
    """Twice the products of the forward pass; attention computes its scores again; element-wise work reads what was
    kept and adds gradients."""
    shares = {"linears": 2.0, "attention": 2.5 * ATTENTION / ATTENTION_BACKWARD, "element-wise": 2.5, "LargeFOV": 2.0}
    work = {"attention": 2.5}
    for part in forward("backward", vit, images, CROP, gpu):
        factor = work.get(part.name, shares[part.name])
        yield Part("backward", part.name, factor * part.flops, factor * part.bytes, 2 * part.launches,
                   shares[part.name] * part.seconds)  # fmt: skip


def kernels(images: int, vit: Vit, gpu: Gpu) -> Iterator[Part]:
    """Our own kernels: a multiple of their limits."""
    limits = Limits(gpu.name, gpu.bandwidth, MULTIPROCESSORS * 16 * 1.755e9, MULTIPROCESSORS * 128 * 2 * 1.755e9)
    size = Size(VOC, images)

    def limit(name: str, mode: str, size: Size = size) -> float:
        problem = OPERATORS[name].problem(size, torch.device("cpu"), filled=False)
        return KERNELS * limits.least(problem.costs[mode])[0] / 1e3

    yield Part("labels", "fuse_cams, histograms", 0, 0, 12, 4 * limit("fuse_cams", "forward"))
    # The fits, some 60 µs, lie beside ON's forward pass, which is longer.
    yield Part("labels", "fit_mixture", 0, 0, 2, 0.0)
    pairs = Size(VOC, images, variant="probability")
    losses = [("raw_cross_entropy", size), ("seg_to_cam_loss", size), ("contrastive_separation", pairs)]
    yield Part("losses", "c2s, s2c, csc", 0, 0, 40, sum(limit(name, "forward", at) for name, at in losses))
    yield Part("backward", "c2s, s2c, csc", 0, 0, 15, sum(limit(name, "backward", at) for name, at in losses))
    count = 12 * vit.depth * vit.width**2 + TAPS * DECODER * (vit.width + DECODER)
    moved = 40.0 * count  # Θ, moments and Θ' in and out, gradient, copies for both networks
    yield Part("optimiser", "AdamW, EMA", 0, moved, 8, moved / (gpu.bandwidth * STREAM))
    gathered = 2.0 * HALF * count
    yield Part("backward", "gradients into one buffer", 0, gathered, 6, gathered / (gpu.bandwidth * STREAM))
    views = 4.0 * images * 3 * CROP**2
    # Scaled, mirrored, cast; and the batch into the captured step's memory.
    moved = views * (2 * 2 + sum(3 * scale**2 for scale in SCALES))
    yield Part("AN", "views", 0, moved, 16, moved / (gpu.bandwidth * STREAM))


def predict(vit: Vit, images: int, gpu: Gpu) -> dict[str, Any]:
    """The row of one network, batch and GPU."""
    parts = [part for scale in SCALES for part in forward("AN", vit, 2 * images, round(CROP * scale), gpu)]
    parts += forward("ON", vit, images, CROP, gpu)
    parts += backward(vit, images, gpu)
    parts += kernels(images, vit, gpu)
    merged: dict[tuple[str, str], Part] = {}
    for part in parts:
        key = (part.phase, part.name)
        before = merged.get(key, Part(*key, 0, 0, 0, 0.0))
        merged[key] = Part(
            *key, before.flops + part.flops, before.bytes + part.bytes, before.launches + part.launches,
            before.seconds + part.seconds + part.launches * LAUNCH,
        )  # fmt: skip
    phases: dict[str, float] = {}
    for part in merged.values():
        phases[part.phase] = phases.get(part.phase, 0.0) + 1e3 * part.seconds
    milliseconds = sum(phases.values())
    flops = sum(part.flops for part in merged.values())
    return {
        "gpu": gpu.name, "backbone": vit.name, "batch_size": images, "ms": milliseconds,
        "images_per_second": 1e3 * images / milliseconds, "gflop": flops / 1e9,
        "share_of_matrix_rate": flops / (gpu.matrix * milliseconds / 1e3),
        "launches": sum(part.launches for part in merged.values()), "phases_ms": phases,
        "parts": [
            {"phase": p.phase, "part": p.name, "gflop": p.flops / 1e9, "mb": p.bytes / 1e6, "launches": p.launches,
             "ms": 1e3 * p.seconds}
            for p in merged.values()
        ],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    parser = CommandLine(prog="python -m bench.steps.prediction", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=result_file, help="JSON")
    out = parser.parse_args(argv).out
    rows = [predict(vit, images, gpu) for gpu in GPUS for vit in VITS for images in (4, 16)]
    if out:
        write_json(out, {"predicted": True, "crop": CROP, "gpus": [asdict(gpu) for gpu in GPUS], "rows": rows})
    head = ["GPU", "network", "B", "ms", "img/s", "of rate", *rows[0]["phases_ms"]]
    lines = [
        [row["gpu"], row["backbone"], str(row["batch_size"]), f"{row['ms']:.1f}", f"{row['images_per_second']:.0f}",
         f"{row['share_of_matrix_rate']:.0%}", *(f"{value:.1f}" for value in row["phases_ms"].values())]
        for row in rows
    ]  # fmt: skip
    print(aligned(head, lines, words=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
