"""Segment image files: `python -m cosa_fast.predict CKPT IMAGE... -o DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cosa_fast.cli import run_cli
from cosa_fast.data_pipeline.datasets.images import IMAGE_SUFFIXES, read_image
from cosa_fast.data_pipeline.views.pixels import normalise
from cosa_fast.device import compute_type, pick_device
from cosa_fast.errors import UserError
from cosa_fast.evaluation.evaluator import class_indices
from cosa_fast.evaluation.inference import allowed_classes, segment
from cosa_fast.evaluation.networks import Networks, load_networks
from cosa_fast.pictures.overlay import overlay
from cosa_fast.pictures.palette import palette_image

MAX_SIDE = 1024


@dataclass(frozen=True)
class Job:
    """One image and the two files made from it."""

    image: Path
    mask: Path
    overlay: Path


def plan(sources: Sequence[Path], directory: Path) -> list[Job]:
    """The images that files and folders name (a folder: its own image files, in order of their names), each once.

    UserError: no image, a missing source, two images with one result, a result that would replace an input.
    """
    images = list({path.absolute(): path for source in sources for path in _images(source)}.values())
    if not images:
        raise UserError(f"no images in {', '.join(map(str, sources))}; wanted: {', '.join(IMAGE_SUFFIXES)}")
    jobs = [Job(path, directory / f"{path.stem}.png", directory / f"{path.stem}_overlay.jpg") for path in images]
    inputs = {_identity(path): path for path in images if path.exists()}
    makers: dict[Path, Path] = {}
    for job in jobs:
        for output in (job.mask, job.overlay):
            if output.exists() and _identity(output) in inputs:
                raise UserError(f"{output} is an input and would be overwritten; choose another folder with -o")
            if output in makers:
                raise UserError(
                    f"{makers[output]} and {job.image} would both be written to {output}; predict them into two folders"
                )
            makers[output] = job.image
    return jobs


def predict(
    networks: Networks,
    jobs: Sequence[Job],
    *,
    network: str = "teacher",
    scales: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    max_side: int = MAX_SIDE,
) -> Iterator[tuple[Job, np.ndarray | UserError]]:
    """Segment each job's image and write its two files; yields the job with its (H, W) uint8 classes or its error.

    labels: class names that may appear besides background (label-aware); None: all (label-free).
    scales: None means those of the configuration. Images longer than max_side are shrunk for the network alone.
    """
    config = networks.config
    device = pick_device(config.run.device)
    model = (networks.student if network == "student" else networks.teacher).to(device)
    allowed = None if labels is None else _allowed(labels, networks.classes, device)
    for job in jobs:
        try:
            image = read_image(job.image)
        except UserError as error:
            yield job, error
            continue
        pixels = normalise(_shrink(image, max_side), config.data.mean, config.data.std).to(device)
        size = (image.height, image.width)
        classes = segment(
            model,
            pixels,
            size,
            scales or config.eval.scales,
            flip=config.eval.flip,
            allowed=allowed,
            dtype=compute_type(config.run.precision, device),
        ).numpy()
        _write(job, image, classes)
        yield job, classes


def main(argv: list[str] | None = None) -> int:
    """Segment images and print what was written. Returns the exit status."""
    arguments = _parser().parse_intermixed_args(argv)
    labels = None if arguments.labels is None else [name.strip() for name in arguments.labels.split(",")]
    jobs = plan(arguments.images, arguments.output)
    networks = load_networks(arguments.checkpoint)
    _make_directory(arguments.output)
    failures = []
    results = predict(
        networks,
        jobs,
        network=arguments.network,
        scales=arguments.scales,
        labels=labels,
        max_side=arguments.max_side,
    )
    for job, result in results:
        if isinstance(result, UserError):
            failures.append(result)
            print(f"skipped: {result}", file=sys.stderr)
        else:
            print(f"{job.image}: {describe(result, networks.classes)} -> {job.mask}, {job.overlay.name}")
    if failures:
        raise UserError(f"{len(failures)} of {len(jobs)} images unreadable, the others are written: {failures[0]}")
    return 0


def describe(classes: np.ndarray, names: Sequence[str]) -> str:
    """The foreground classes of a segmentation with their share of the image, largest first."""
    counts = np.bincount(classes.ravel(), minlength=len(names) + 1)[1:]
    found = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
    return ", ".join(f"{names[index]} {counts[index] / classes.size:.1%}" for index in found) or "background only"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cosa_fast.predict",
        description="Segment images: DIR/NAME.png (palette image, pixel = class index) and DIR/NAME_overlay.jpg.",
    )
    parser.add_argument("checkpoint", help="a file of runs/NAME/checkpoints")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="made if absent")
    parser.add_argument("--network", choices=("teacher", "student"), default="teacher", help="default: teacher (AN)")
    parser.add_argument("--scales", type=_scales, help="e.g. 1.0 or 1,0.5,1.5; default: those of the evaluation")
    parser.add_argument("--labels", metavar="cat,dog", help="only these classes may appear (label-aware)")
    parser.add_argument(
        "--max-side",
        type=_side,
        default=MAX_SIDE,
        metavar="PIXELS",
        help=f"longer images are shrunk to this for the network, the result keeps their size; default {MAX_SIDE}",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _scales(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.strip("[]").split(","))
    except ValueError:
        values = ()
    if not values or not all(0.1 <= value <= 8 for value in values):
        raise UserError(f"--scales {text}: give numbers from 0.1 to 8 with commas between, for example 1,0.5,1.5")
    return values


def _side(text: str) -> int:
    if not text.isdecimal() or int(text) < 16:
        raise UserError(f"--max-side {text}: give a whole number of pixels from 16 up")
    return int(text)


def _images(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    return [source]


def _identity(path: Path) -> tuple[int, int]:
    """The same for two names (links, other spellings) of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _allowed(labels: Sequence[str], classes: tuple[str, ...], device: torch.device) -> torch.Tensor:
    indices = torch.tensor(class_indices(labels, classes, "--labels"), device=device)
    return allowed_classes(indices - 1, len(classes) + 1)


def _shrink(image: Image.Image, max_side: int) -> Image.Image:
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"-o {path}: cannot make this folder ({error.strerror}); choose another") from error


def _write(job: Job, image: Image.Image, classes: np.ndarray) -> None:
    try:
        palette_image(classes).save(job.mask)
        overlay(image, classes).save(job.overlay, quality=90)
    except OSError as error:
        raise UserError(f"{job.mask.parent}: cannot write {job.mask.name} ({error.strerror or error})") from error


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
