"""Behind bench/data.py: the pipelines side by side on copies of the same images, as tables and a chart."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.tables import print_providers, save_bars
from bench.timing import quantiles, seconds_of
from bench.views.provider import STAGES, Provider, Served, Window
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import write_labels
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.preparation import pack
from cosa_fast.data_pipeline.datasets.voc import LISTS
from cosa_fast.run.data import dali_problem

QUALITY = 90  # of enlarged images
READS = 5  # times all files are read
SOURCES = ("files", "packed")
CPU = torch.device("cpu")


def copy_images(dataset: ImageDataset, root: Path, count: int, enlarge: int | None) -> dict[str, Any]:
    """Write the first `count` images to `root` in VOC layout, and packed to ROOT/train.tar; `enlarge`: as JPEGs whose
    longer side has so many pixels, in place of the files as they are. Returns what they are.
    """
    ids = dataset.ids[:count]
    for folder in (root / "JPEGImages", root / LISTS):
        folder.mkdir(parents=True)
    pixels = encoded = 0
    for index, id in enumerate(ids):
        image = dataset.image(index)
        data = dataset.encoded(index)
        if enlarge is not None:
            image = _with_longer_side(image, enlarge)
            data = _jpeg(image)
        (root / "JPEGImages" / f"{id}.jpg").write_bytes(data)
        pixels += image.width * image.height
        encoded += len(data)
    (root / LISTS / "train.txt").write_text("\n".join(ids))
    write_labels(root / "labels.json", {id: [] for id in ids})
    pack(open_dataset("voc", root, "train"), "train", root / "train.tar")
    return {
        "enlarged_to": enlarge, "images": len(ids), "mean_megapixels": pixels / len(ids) / 1e6,
        "mean_kib": encoded / len(ids) / 1024,
    }  # fmt: skip


def _with_longer_side(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _jpeg(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def read_speed(root: Path) -> dict[str, float]:
    """Images per second of reading alone, nothing decoded, by one thread: files and pack in turns, medians."""
    datasets = {source: open_dataset("voc", root, "train", pack=_pack(root, source)) for source in SOURCES}
    seconds: dict[str, list[float]] = {source: [] for source in SOURCES}
    for _, (source, dataset) in product(range(READS), datasets.items()):
        seconds[source].append(seconds_of(partial(_read, dataset), CPU))
    return {source: len(datasets[source]) / statistics.median(times) for source, times in seconds.items()}


def _read(dataset: ImageDataset) -> None:
    for index in range(len(dataset)):
        dataset.encoded(index)


def _pack(root: Path, source: str) -> Path | None:
    return root / "train.tar" if source == "packed" else None


def compare(providers: list[Provider], windows: int, batches: int) -> dict[str, Any]:
    """Measure the providers in turns, `windows` windows of `batches` batches each, after one window to warm up."""
    served = {provider.name: Served(provider, batches) for provider in providers}
    try:
        for one in served.values():
            one.window()
        taken: dict[str, list[Window]] = {name: [] for name in served}
        for _, (name, one) in product(range(windows), served.items()):
            window = one.window()
            if window is not None:
                taken[name].append(window)
        return {name: summary(taken[name], one.error) for name, one in served.items()}
    finally:
        for one in served.values():
            one.close()


def summary(windows: list[Window], error: str | None) -> dict[str, Any]:
    """Medians with 20/80 quantiles; of memory the largest."""
    if error is not None:
        return {"error": error}
    low, median, high = quantiles([window.images / window.seconds for window in windows])
    cpu = [1000 * window.cpu_seconds / window.images for window in windows]
    return {
        "images_per_second": median, "images_per_second_20": low, "images_per_second_80": high,
        "cpu_seconds_per_1000": statistics.median(cpu), "windows": len(windows),
        "peak_rss_mib": max(window.rss_bytes for window in windows) / 2**20,
    }  # fmt: skip


def print_table(result: dict[str, Any]) -> None:
    """One stage's providers, the fastest first."""
    images = result["images"]
    print(
        f"{STAGES[result['stage']]}: {images['images']} images of {images['mean_megapixels']:.3f} megapixels and "
        f"{images['mean_kib']:.0f} KiB on average, crop {result['crop']}, batches of {result['batch_size']}"
    )

    def cells(row: dict[str, Any]) -> list[str]:
        speeds = (f"{row[f'images_per_second{part}']:.1f}" for part in ("", "_20", "_80"))
        return [*speeds, f"{row['cpu_seconds_per_1000']:.1f}", f"{row['peak_rss_mib']:.0f}"]

    print_providers(("img/s", "20%", "80%", "CPU s/1000", "RSS MiB"), result["providers"], cells)


def save_chart(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of images per second, a panel for each result."""

    def title(result: dict[str, Any]) -> str:
        return f"{STAGES[result['stage']]}, {result['images']['mean_megapixels']:.3f} megapixels, crop {result['crop']}"

    save_bars([(title(result), result["providers"]) for result in results], path)


def pipelines() -> list[str]:
    """What this machine can run; says why DALI is left out."""
    found = ["torch"]
    for name, device in {"DALI": "cpu", "DALI GPU": "cuda"}.items():
        problem = dali_problem(torch.device(device)) if device == "cpu" or torch.cuda.is_available() else "no GPU"
        if problem is None:
            found.append(name)
        else:
            print(f"without {name}: {problem}")
    return found


def providers(config: Config, stage: str, root: Path, counts: Sequence[int], names: list[str]) -> list[Provider]:
    """All that a stage is measured with."""
    views, size, seed = config.data, config.optim.batch_size, config.run.seed
    return [
        Provider(name, count, stage, root, _pack(root, source), views, size, seed)
        for name, source, count in product(names, SOURCES, counts)
    ]


def measure_all(
    config: Config, stages: Sequence[str], workers: Sequence[int], *,
    images: int, enlarge: int | None, windows: int, batches: int,
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """Print a table for the first `images` images as they are, if `enlarge` is a number also as JPEGs whose longer side
    has so many pixels, and for every stage: every pipeline with every count of `workers`, in `windows` windows of
    `batches` batches. After each, all results so far."""
    data, size = config.data, config.optim.batch_size
    dataset = open_dataset(data.format, data.root, data.train_split, need_labels=False, pack=data.pack)
    results: list[dict[str, Any]] = []
    names = pipelines()
    for side in dict.fromkeys((None, enlarge)):
        with tempfile.TemporaryDirectory(prefix="cosa_fast_bench_") as folder:
            root = Path(folder)
            facts = copy_images(dataset, root, images, side)
            facts["read_images_per_second"] = read_speed(root)
            for stage in stages:
                competing = providers(config, stage, root, workers, names)
                results.append({
                    "stage": stage, "images": facts, "crop": data.crop_size, "batch_size": size,
                    "batches": batches, "providers": compare(competing, windows, batches),
                })  # fmt: skip
                print_table(results[-1])
                yield results
