"""Segment images: `python -m cosa_fast.predict CKPT IMAGE ... -o DIR`, or all of a data set's split: `--split NAME`.
CKPT may be what `export` wrote, or a file of another program, such as the official release's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosa_fast.cli import (
    NETWORKS,
    CommandLine,
    add_crf_side,
    add_network,
    is_setting,
    require_two_networks,
    run_cli,
    whole,
)
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.errors import UserError, counted
from cosa_fast.evaluation.cleaning import METHODS, check_methods
from cosa_fast.evaluation.networks import Networks, load_networks
from cosa_fast.evaluation.prediction import MAX_SIDE, Source, file_sources, require_free, split_sources
from cosa_fast.files import require_place, write_json
from cosa_fast.pictures import voc_test
from cosa_fast.pictures.predictions import WHATS, Prediction, Predictor
from cosa_fast.run.evaluating import OF_IMAGES, PREDICTION, configure


def main(argv: list[str] | None = None) -> int:
    """Predict and print what was written. Returns the exit status."""
    arguments = _parser().parse_intermixed_args(argv)
    require_place(arguments.output, "-o", folder=True)
    overrides = [text for text in arguments.images if is_setting(text)]
    places = [Path(text) for text in arguments.images if not is_setting(text)]
    labels = None if arguments.labels is None else [name.strip() for name in arguments.labels.split(",")]
    _check(arguments, places)
    sources = [] if arguments.split else file_sources(places)  # a wrong name is told before networks are read
    networks = load_networks(arguments.checkpoint, config=arguments.config, overrides=overrides)
    require_two_networks(arguments.network, arguments.checkpoint, networks.single)
    network = NETWORKS[arguments.network or "an"]
    if networks.imported is not None:
        print(networks.imported)
    used = PREDICTION if arguments.split or networks.imported is not None else OF_IMAGES
    networks = replace(networks, config=configure(networks, overrides, arguments.checkpoint, used))
    if arguments.split:
        networks, sources = _of_split(networks, arguments.split)
    if arguments.voc_test:
        voc_test.check_classes(networks.classes)
    predictor = Predictor(
        networks,
        arguments.what,
        network=network,
        scales=arguments.scales,
        labels=labels,
        threshold=arguments.threshold,
        max_side=arguments.max_side,
        crf=arguments.crf,
        crf_side=arguments.crf_side,
    )
    require_free(sources, lambda source: predictor.outputs(source.name, arguments.output))
    if networks.config.run.threads is not None:
        torch.set_num_threads(networks.config.run.threads)
    records, failures = _predict_all(predictor, sources, arguments.output)
    about = {"checkpoint": arguments.checkpoint, "network": network, "what": arguments.what}
    about |= {"threshold": predictor.threshold, "classes": networks.classes, "images": records}
    write_json(arguments.output / "scores.json", about)
    written = arguments.output / "scores.json"
    print(f"written: {written} (of {counted(len(records), 'image')}: scores, classes, {_areas(predictor)})")
    for hint in _hints(records, predictor, {source.name for source in sources if source.present is None}):
        print(f"hint: {hint}")
    if failures:
        raise UserError(
            f"{len(failures)} of {counted(len(sources), 'image')} unreadable, the others are written: {failures[0]}"
        )
    if arguments.voc_test:
        print(f"written and checked: {_archive(records, arguments.output, arguments.voc_test)}")
    return 0


def describe(classes: np.ndarray, names: Sequence[str]) -> str:
    """The foreground classes of a segmentation with their share of the image, largest first."""
    counts = np.bincount(classes.ravel(), minlength=len(names) + 1)[1:]
    found = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
    return ", ".join(f"{names[index]} {counts[index] / classes.size:.1%}" for index in found) or "background only"


def _predict_all(
    predictor: Predictor, sources: Sequence[Source], directory: Path
) -> tuple[dict[str, dict[str, Any]], list[UserError]]:
    """The records of scores.json by name, and what could not be read."""
    records, failures = {}, []

    def readable() -> Iterator[tuple[Source, Image.Image, Tensor | None]]:
        for source in sources:
            try:
                yield source, source.read(), source.present
            except UserError as error:
                failures.append(error)
                print(f"skipped: {error}", file=sys.stderr)

    for source, prediction in predictor.stream(readable()):
        paths = predictor.write(prediction, source.name, directory)
        records[source.name] = predictor.record(prediction)
        shown = [str(paths[0]), *(str(path.relative_to(directory)) for path in paths[1:])]
        print(f"{source.path}: {_found(prediction, predictor)}{prediction.remark} -> {', '.join(shown)}")
    return records, failures


def _found(prediction: Prediction, predictor: Predictor) -> str:
    """`describe`, of CAMs their classes first; where that is none, what the classifier thought most likely."""
    seen, names = prediction.seen, predictor.classes
    text = describe(prediction.classes, names) if predictor.has_areas else ""
    if predictor.what == "cam" and len(seen.present):
        areas = f" ({text} at {predictor.threshold:.3g})" if text else ""
        return f"CAM of {', '.join(names[index] for index in seen.present.tolist())}{areas}"
    if prediction.classes.any():
        return text
    best = int(seen.scores.argmax())
    nothing = "no class" if predictor.what == "cam" else text
    return f"{nothing} (the classifier's first guess: {names[best]}, {seen.scores[best].sigmoid():.0%})"


def _areas(predictor: Predictor) -> str:
    if not predictor.has_areas:
        return "no areas, for this checkpoint has no threshold ξ: --threshold 0.4 gives one"
    if predictor.threshold is None:
        return "areas"
    return f"areas where the CAM reaches {predictor.threshold:.3g}, {predictor.threshold_name}"


def _hints(records: dict[str, dict[str, Any]], predictor: Predictor, unknown: set[str]) -> Iterator[str]:
    """What to try where nothing was found. unknown: the images whose classes only the classifier tells."""
    makes_cams, everything = predictor.what in ("cpl", "cam", "ensemble"), counted(len(records), "image")
    unseen = [name for name in records if makes_cams and name in unknown and not records[name]["present"]]
    if unseen:
        likely, score = max((item for name in unseen for item in records[name]["scores"].items()), key=lambda i: i[1])
        yield (
            f"in {len(unseen)} of {everything} the classifier finds no class, so there is no CAM: a class counts from "
            f"50 % on, the highest score is {likely}, {score:.0%}. --labels {likely} takes its CAM anyway"
        )
    empty = [name for name in records if name not in unseen and (records[name]["areas"] or {}).get("background") == 1]
    if empty and predictor.what in ("segmentation", "cpl", "ensemble"):
        lower = "; a lower --threshold makes more of the CAM foreground" if makes_cams else ""
        yield (
            f"background only in {len(empty)} of {everything}: no pixel is surer of a class than of background. "
            "--labels cat,dog says what is there, --what cam --labels cat,dog shows where the network sees it" + lower
        )


def _of_split(networks: Networks, split: str) -> tuple[Networks, list[Source]]:
    """The networks, under the names of the set's classes where their file has none, and its images."""
    data = networks.config.data
    classes = data.classes or (networks.classes if data.format == "folder" else None)
    dataset = open_dataset(data.format, data.root, split, labels=data.labels, classes=classes, need_labels=False)
    networks = networks.for_classes(dataset.classes)
    if tuple(dataset.classes) != networks.classes:
        raise UserError(f"--split {split}: {data.root} has other classes than the checkpoint; set data.classes")
    sources = split_sources(dataset)
    for note in dataset.notes:
        print(f"{split}: {note}")
    labelled = sum(source.present is not None for source in sources)
    where = f"labels of {labelled} from {dataset.label_source}" if labelled else "no image labels"
    print(f"{split} of {data.root}: {counted(len(sources), 'image')}, {where}")
    return networks, sources


def _archive(records: dict[str, dict[str, Any]], directory: Path, competition: str) -> Path:
    archive = directory / f"{competition}_voc2012_test.tgz"
    voc_test.pack({name: directory / "masks" / f"{name}.png" for name in records}, archive, competition)
    sizes = {name: (record["width"], record["height"]) for name, record in records.items()}
    voc_test.check(archive, sizes, competition)
    return archive


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m cosa_fast.predict",
        description="Masks as palette images (pixel = class index), overlays, CAMs or logits of images, each in a "
        "folder of its own below DIR, and scores.json.",
    )
    parser.add_argument(
        "checkpoint", help="a file of runs/NAME/checkpoints, an exported .safetensors, or a file of another program"
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image files, or folders of them; also settings to change, such as data.root=FOLDER eval.flip=false",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="made if absent")
    parser.add_argument(
        "--split", metavar="NAME", help="in place of IMAGE: all of a split of the checkpoint's data set (data.root)"
    )
    parser.add_argument(
        "--what",
        choices=WHATS,
        default=WHATS[0],
        help="segmentation; cpl: the CAM's pseudo-label at ξ; ensemble: that of both CAMs; cam and logits as .npz. "
        "CAMs are those of the split's labels or of --labels, else of the classes that the classifier finds",
    )
    add_network(parser)
    parser.add_argument(
        "--config", metavar="YAML", help="for files of other programs: settings; default: voc_ or coco_published.yaml"
    )
    parser.add_argument(
        "--scales",
        type=_scales,
        short_for="eval.scales",
        help="e.g. 1.0 or 1,0.5,1.5; default: those of the evaluation",
    )
    parser.add_argument("--labels", metavar="cat,dog", help="only these classes may appear (label-aware)")
    parser.add_argument("--threshold", type=_threshold, metavar="X", help="where CAMs become foreground, in place of ξ")
    parser.add_argument(
        "--max-side",
        type=whole(16),
        default=MAX_SIDE,
        metavar="PIXELS",
        help=f"longer images are shrunk to this for the network, the result keeps their size; default {MAX_SIDE}",
    )
    parser.add_argument(
        "--voc-test",
        nargs="?",
        const="comp6",
        choices=voc_test.COMPETITIONS,
        help="with --split test: also DIR/comp6_voc2012_test.tgz for the VOC test server (comp5: no outside data)",
    )
    parser.add_argument("--crf", choices=tuple(METHODS), help="clean the segmentation up by a CRF")
    add_crf_side(parser)
    return parser


def _check(arguments: argparse.Namespace, places: Sequence[Path]) -> None:
    """UserError for options that do not go together."""
    if bool(arguments.split) == bool(places):
        raise UserError("give either images, or --split NAME for those of the checkpoint's data set")
    if arguments.threshold is not None and arguments.what not in ("cpl", "cam", "ensemble"):
        raise UserError(f"--threshold is for --what cpl, cam and ensemble; {arguments.what} has none")
    if arguments.crf is not None and arguments.what != "segmentation":
        raise UserError(f"--crf cleans segmentations up; leave out --what {arguments.what}")
    check_methods([arguments.crf])
    if arguments.voc_test and (arguments.what != "segmentation" or not arguments.split):
        raise UserError("--voc-test packs the segmentation of a whole split: give --split test, and no --what")


def _scales(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.strip("[]").split(","))
    except ValueError:
        values = ()
    if not values or not all(0.1 <= value <= 8 for value in values):
        raise UserError(f"--scales {text}: give numbers from 0.1 to 8 with commas between, for example 1,0.5,1.5")
    return values


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"--threshold {text}: give a number from 0 to 1, for example 0.4")
    return value


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
