"""Speed of the data pipelines: `python bench/data.py [CONFIG [key=value ...]] [--enlarge 500] [--out FILE.json]`.

Images per second, processor seconds and peak memory of decoding alone, the weak view, and both views, from image files
and from a pack. Every provider runs in a process of its own, and they take turns window by window, each window a
fresh stream over the same images: whatever else the machine does meets all of them, and all do the same work. The file
cache is warm: what a slow disk costs is not in these figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.tables import quantiles, save_bars
from bench.views.provider import STAGES, Provider, Served, Window
from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import write_labels
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.preparation import pack
from cosa_fast.data_pipeline.datasets.voc import LISTS
from cosa_fast.device import pick_device
from cosa_fast.errors import UserError
from cosa_fast.run import manifest
from cosa_fast.run.data import dali_problem

QUALITY = 90  # of enlarged images
READS = 5  # times all files are read
SOURCES = ("files", "packed")


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
        start = time.perf_counter()
        for index in range(len(dataset)):
            dataset.encoded(index)
        seconds[source].append(time.perf_counter() - start)
    return {source: len(datasets[source]) / statistics.median(times) for source, times in seconds.items()}


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
    print(f"{'':34}{'img/s':>9}{'20%':>9}{'80%':>9}{'CPU s/1000':>12}{'RSS MiB':>9}")
    for name, row in sorted(result["providers"].items(), key=lambda item: -item[1].get("images_per_second", 0)):
        if "error" in row:
            print(f"{name:34}failed: {row['error']}")
            continue
        speeds = "".join(f"{row[f'images_per_second{part}']:9.1f}" for part in ("", "_20", "_80"))
        print(f"{name:34}{speeds}{row['cpu_seconds_per_1000']:12.1f}{row['peak_rss_mib']:9.0f}")


def save_chart(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of images per second, a panel for each result."""

    def title(result: dict[str, Any]) -> str:
        return f"{STAGES[result['stage']]}, {result['images']['mean_megapixels']:.3f} megapixels, crop {result['crop']}"

    def bars(result: dict[str, Any]) -> dict[str, float]:
        rows = result["providers"].items()
        return {name: row["images_per_second"] for name, row in rows if "error" not in row}

    save_bars([(title(result), bars(result)) for result in results], path)


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


def providers(config: Config, stage: str, root: Path, counts: list[int], names: list[str]) -> list[Provider]:
    """All that a stage is measured with."""
    views, size, seed = config.data, config.optim.batch_size, config.run.seed
    return [
        Provider(name, count, stage, root, _pack(root, source), views, size, seed)
        for name, source, count in product(names, SOURCES, counts)
    ]


def measure_all(config: Config, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every image set and stage; each result is printed as soon as it is there."""
    data = config.data
    dataset = open_dataset(data.format, data.root, data.train_split, need_labels=False, pack=data.pack)
    results, names = [], pipelines()
    for enlarge in (None, arguments.enlarge) if arguments.enlarge is not None else (None,):
        with tempfile.TemporaryDirectory(prefix="cosa_fast_bench_") as folder:
            root = Path(folder)
            images = copy_images(dataset, root, arguments.images, enlarge)
            images["read_images_per_second"] = read_speed(root)
            for stage in arguments.stages:
                competing = providers(config, stage, root, arguments.workers, names)
                compared = compare(competing, arguments.windows, arguments.batches)
                results.append({
                    "stage": stage, "images": images, "crop": data.crop_size, "batch_size": config.optim.batch_size,
                    "batches": arguments.batches, "providers": compared,
                })  # fmt: skip
                print_table(results[-1])
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python bench/data.py", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="voc.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--stages", choices=list(STAGES), nargs="+", default=list(STAGES))
    parser.add_argument("--workers", type=int, nargs="+", default=_counts(), help="worker processes, or threads")
    parser.add_argument("--images", type=int, default=256, help="of the training split, the first so many")
    parser.add_argument("--enlarge", type=int, metavar="PIXELS", help="also measure JPEGs with so long a longer side")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--batches", type=int, default=30, help="per window")
    parser.add_argument("--out", type=Path, help="JSON; the chart goes beside it")
    arguments = parser.parse_intermixed_args(argv)
    numbers = [
        arguments.windows,
        arguments.batches,
        arguments.images,
        1 if arguments.enlarge is None else arguments.enlarge,
        *arguments.workers,
    ]
    if min(numbers) < 1:
        raise UserError("--windows, --batches, --images, --enlarge and --workers must be at least 1")
    config = load_config(arguments.config, arguments.overrides)
    results = measure_all(config, arguments)
    if arguments.out is not None:
        machine = manifest.describe(config, pick_device(config.run.device), cores=_cores(), file_cache="warm")
        arguments.out.write_text(
            json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8"
        )
        save_chart(results, arguments.out.with_suffix(".png"))
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _counts() -> list[int]:
    """Powers of two up to the number of cores, and that number."""
    cores = _cores()
    return sorted({2**k for k in range(cores.bit_length())} | {cores})


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
