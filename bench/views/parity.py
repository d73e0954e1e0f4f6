"""How far the DALI pipeline's pixels are from PIL's, operation by operation, in 8-bit steps.

    python -m bench.views.parity [FORMAT ROOT SPLIT] [--device cuda] [--out bench/results/parity_cpu.json]

Without a data set: generated images. docs/data.md quotes the results.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import pipeline_def
from PIL import Image

from bench.arguments import require_positive, result_file
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.dali.feed import File
from cosa_fast.data_pipeline.dali.pipeline import DaliPipeline
from cosa_fast.data_pipeline.dali.pipeline import views as graph_views
from cosa_fast.data_pipeline.dali.samples import Sample, graph_inputs
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.images import lossless, read_image
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.scene import paint
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.data_pipeline.views.parameters import COLOUR_OPERATIONS, AugmentConfig, AugmentParameters, Box, draw
from cosa_fast.data_pipeline.views.pixels import apply_colour as apply_colour_with_pil
from cosa_fast.data_pipeline.views.pixels import weak_region
from cosa_fast.errors import UserError
from cosa_fast.files import write_json
from cosa_fast.run import manifest

CROP = 448
RADII = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
BORDER = 6  # pixels that a blur of radius 2 reaches
Row = dict[str, Any]
Pairs = list[tuple[np.ndarray, np.ndarray]]
Case = tuple[Row, dict[str, Any], int]  # what the row says, what is changed, how wide the edge is


def generated(count: int) -> list[bytes]:
    """Files of scenes, of noise, and of a gradient, of several sizes."""
    rng = np.random.default_rng(0)
    scenes = [Image.fromarray(paint(0, 0, index, 200 + 40 * index)[0]) for index in range(count)]
    noise = Image.fromarray(rng.integers(0, 256, (90, 130, 3), dtype=np.uint8))
    gradient = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    return [lossless(image) for image in (*scenes, noise, gradient)]


def unchanged(size: tuple[int, int], **changes: Any) -> AugmentParameters:
    """Parameters that leave an image of (height, width) `size` as it is, but for `changes`."""
    whole = Box(0, 0, *size)
    return replace(AugmentParameters(size, False, whole, whole, 0.0, "identity", 5), **changes)


def views(files: Sequence[bytes], parameters: Sequence[AugmentParameters], device: torch.device) -> tuple[Pairs, Pairs]:
    """((DALI's, PIL's) weak views, the same of the strong views), each (height, width, 3) uint8."""
    images = [_image(file) for file in files]
    ours = _with_dali(files, [(image.height, image.width) for image in images], parameters, device)
    weak = [weak_region(image, p) for image, p in zip(images, parameters, strict=True)]
    strong = [apply_colour_with_pil(view, p.operation, p.magnitude) for view, p in zip(weak, parameters, strict=True)]
    return _pairs(ours[0], weak), _pairs(ours[1], strong)


def distance(pairs: Pairs, border: int = 0) -> Row:
    """Mean and maximum of the absolute differences, the share that is above 1, and the maximum more than `border`
    pixels away from the edges."""
    differences = [np.abs(a.astype(np.int16) - b.astype(np.int16)) for a, b in pairs]
    inside = [d[border : d.shape[0] - border, border : d.shape[1] - border] for d in differences]
    values = np.concatenate([d.ravel() for d in differences])
    return {**_spread(values), "max_inside": max(int(d.max(initial=0)) for d in inside)}


def _spread(values: np.ndarray) -> Row:
    """What both kinds of rows say of absolute differences."""
    return {
        "mean": round(float(values.mean()), 4),
        "max": int(values.max()),
        "above_1": round(float((values > 1).mean()), 6),
    }


def rows(files: Sequence[bytes], device: torch.device) -> Iterator[Row]:
    """One row per operation and strength: all files with nothing but that operation."""
    sizes = [(image.height, image.width) for image in map(_image, files)]
    for flip in (False, True):
        config = AugmentConfig(crop_size=CROP, flip_probability=float(flip), blur_probability=0, strong=False)
        drawn = [draw(0, position, size, config) for position in range(4) for size in sizes]
        weak, _ = views([*files] * 4, drawn, device)
        yield {"operation": "resize, flipped" if flip else "resize", **distance(weak, border=2)}
    cases = [*_weak_cases(), *_strong_cases()]
    parameters = [unchanged(size, **changes) for _, changes, _ in cases for size in sizes]
    pairs = views([*files] * len(cases), parameters, device)
    for number, (row, changes, border) in enumerate(cases):
        view = pairs["operation" in changes]
        yield {**row, **distance(view[number * len(files) : (number + 1) * len(files)], border)}


def _weak_cases() -> Iterator[Case]:
    yield {"operation": "decode"}, {}, 0
    for radius in RADII:
        yield {"operation": "blur", "radius": radius}, {"blur_radius": radius}, BORDER


def _strong_cases() -> Iterator[Case]:
    for operation in COLOUR_OPERATIONS:
        magnitudes = (5,) if operation in ("identity", "autocontrast", "equalize") else range(1, 10)
        for magnitude in magnitudes:
            changes = {"operation": operation, "magnitude": magnitude}
            yield changes, changes, 1


def chain(dataset: ImageDataset, config: AugmentConfig, images: int, device: torch.device) -> Iterator[Row]:
    """Rows of the whole pipelines: the first `images` positions, valid pixels only."""
    ours = DaliPipeline(dataset, config, 1, 0, device=device)
    found: dict[str, list[np.ndarray]] = {"weak": [], "strong": []}
    for batch, reference in islice(zip(ours, TorchPipeline(dataset, config, 1, 0), strict=True), images):
        for name, differences in found.items():
            step = 255 * torch.tensor(config.std).view(3, 1, 1)
            values = (getattr(batch, name)[0].cpu() - getattr(reference, name)[0]).abs() * step
            differences.append(values[:, reference.valid[0]].round().numpy().ravel())
    for name, differences in found.items():
        yield {"operation": f"whole chain, {name} view", **_spread(np.concatenate(differences))}


def measure(dataset: ImageDataset | None, images: int, device: torch.device) -> list[Row]:
    """All rows on the first `images` images of the data set (None: generated images, and no whole chain)."""
    if dataset is None:
        return list(rows(generated(4), device))
    files = [dataset.encoded(index) for index in range(images)]
    return [*rows(files, device), *chain(dataset, AugmentConfig(crop_size=CROP), 4 * images, device)]


def main(argv: list[str] | None = None) -> int:
    """Compare and print a line for each row; returns the exit status."""
    parser = CommandLine(
        prog="python -m bench.views.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", help="FORMAT ROOT SPLIT")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=result_file)
    asked = parser.parse_args(argv)
    if len(asked.data) not in (0, 3):
        raise UserError("give FORMAT ROOT SPLIT, or no data set")
    require_positive(asked, "images")
    device = torch.device(asked.device)
    found = measure(open_dataset(*asked.data) if asked.data else None, asked.images, device)
    for row in found:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if asked.out is not None:
        facts = manifest.describe(Config(), device)
        machine = {key: facts[key] for key in ("commit", "python", "packages", "machine", "device")}
        data = {"set": Path(asked.data[1]).name, "split": asked.data[2], "images": asked.images} if asked.data else None
        result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **machine, "data": data, "rows": found}
        write_json(asked.out, result)
    return 0


@lru_cache(maxsize=32)
def _image(file: bytes) -> Image.Image:
    return read_image(Path("image"), file)


def _pairs(ours: list[np.ndarray], images: list[Image.Image]) -> Pairs:
    return [(own, np.asarray(image)) for own, image in zip(ours, images, strict=True)]


def _with_dali(
    files: Sequence[bytes],
    sizes: Sequence[tuple[int, int]],
    parameters: Sequence[AugmentParameters],
    device: torch.device,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The graph up to the uint8 images of both views."""
    gpu = device.type == "cuda"
    none = torch.zeros(0)
    batch = [
        Sample(File(0, np.frombuffer(file, np.uint8) if gpu else np.array(_image(file)), size), "", p, none, None, [])
        for file, size, p in zip(files, sizes, parameters, strict=True)
    ]
    inputs = graph_inputs(batch, CROP)

    def graph() -> tuple[Any, ...]:
        weak, strong, used = graph_views(lambda: inputs, gpu)
        return weak, strong, used.position

    index = device.index or 0 if gpu else None
    define = pipeline_def(batch_size=len(files), num_threads=2, device_id=index, enable_conditionals=True)
    weak, strong, _ = define(graph)().run()
    return [np.array(image) for image in weak.as_cpu()], [np.array(image) for image in strong.as_cpu()]


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
