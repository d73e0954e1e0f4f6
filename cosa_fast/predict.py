"""Segment image files: `python -m cosa_fast.predict CKPT IMAGE... -o DIR`; CKPT may be a file of another program, such
as the official release's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosa_fast.cli import NETWORKS, add_crf_side, run_cli
from cosa_fast.data_pipeline.datasets.images import read_image
from cosa_fast.errors import UserError
from cosa_fast.evaluation.cleaning import METHODS, Cleaner, check_methods
from cosa_fast.evaluation.networks import load_networks
from cosa_fast.evaluation.prediction import MAX_SIDE, Job, Segmenter, plan
from cosa_fast.pictures.overlay import overlay
from cosa_fast.pictures.palette import palette_image


def main(argv: list[str] | None = None) -> int:
    """Segment images and print what was written. Returns the exit status."""
    arguments = _parser().parse_intermixed_args(argv)
    labels = None if arguments.labels is None else [name.strip() for name in arguments.labels.split(",")]
    jobs = plan(arguments.images, arguments.output)
    check_methods([arguments.crf])
    networks = load_networks(arguments.checkpoint, config=arguments.config)
    if networks.imported is not None:
        print(networks.imported)
    _make_directory(arguments.output)
    segmenter = Segmenter(
        networks,
        network=NETWORKS[arguments.network],
        scales=arguments.scales,
        labels=labels,
        max_side=arguments.max_side,
    )
    failures: list[UserError] = []
    images = _read(jobs, failures)
    results: Iterable[tuple[Job, Image.Image, np.ndarray, str]]
    if arguments.crf is None:
        results = ((job, image, segmenter.segment(image), "") for job, image in images)
    else:
        results = _cleaned(images, segmenter, arguments.crf, networks.config.data.workers, arguments.crf_side)
    for job, image, classes, remark in results:
        _write(job, image, classes)
        print(f"{job.image}: {describe(classes, networks.classes)}{remark} -> {job.mask}, {job.overlay.name}")
    if failures:
        raise UserError(f"{len(failures)} of {len(jobs)} images unreadable, the others are written: {failures[0]}")
    return 0


def _read(jobs: Sequence[Job], failures: list[UserError]) -> Iterator[tuple[Job, Image.Image]]:
    """The images that can be read; what is wrong with others is printed, and added to `failures`."""
    for job in jobs:
        try:
            image = read_image(job.image)
        except UserError as error:
            failures.append(error)
            print(f"skipped: {error}", file=sys.stderr)
            continue
        yield job, image


def _cleaned(
    images: Iterable[tuple[Job, Image.Image]], segmenter: Segmenter, method: str, processes: int, side: int | None
) -> Iterator[tuple[Job, Image.Image, np.ndarray, str]]:
    """The images with their segmentations after the CRF, and how long that took."""

    def problems() -> Iterator[tuple[tuple[Job, Image.Image], Tensor, Tensor]]:
        for job, image in images:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(segmenter.device)
            yield (job, image), segmenter.probabilities(image), pixels

    with Cleaner([method], processes, segmenter.device, side) as cleaner:
        for (job, image), cleaned in cleaner.map(problems()):
            result = cleaned[method]
            yield job, image, result.labels.astype(segmenter.pixel_type), f" (CRF {result.seconds:.1f} s)"


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
    parser.add_argument("checkpoint", help="a file of runs/NAME/checkpoints, or a weight file of another program")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="made if absent")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="an", help="default: an")
    parser.add_argument(
        "--config", metavar="YAML", help="for files of other programs: settings; default: voc_ or coco_published.yaml"
    )
    parser.add_argument("--scales", type=_scales, help="e.g. 1.0 or 1,0.5,1.5; default: those of the evaluation")
    parser.add_argument("--labels", metavar="cat,dog", help="only these classes may appear (label-aware)")
    parser.add_argument(
        "--max-side",
        type=_side,
        default=MAX_SIDE,
        metavar="PIXELS",
        help=f"longer images are shrunk to this for the network, the result keeps their size; default {MAX_SIDE}",
    )
    parser.add_argument("--crf", choices=tuple(METHODS), help="clean the segmentation up by a CRF")
    add_crf_side(parser)
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
