"""Check a data set, build its label file where it has none, and with --pack write its images into one file:
python -m cosa_fast.prepare --format voc --root ROOT --split train_aug --pack
python -m cosa_fast.prepare --format folder --root ROOT
"""

import argparse
import os
from pathlib import Path

from cosa_fast.cli import run_cli
from cosa_fast.data_pipeline.datasets.opening import FORMATS
from cosa_fast.data_pipeline.datasets.preparation import SOURCES, prepare
from cosa_fast.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, prepare, print the counts; 0 when the label file, and the tar if one is asked for, are
    written.
    """
    asked = _parser().parse_args(argv)
    if asked.split is None:
        if asked.format != "folder":
            raise UserError(f"--split: which list of the {asked.format} set? e.g. --split train")
        asked.split = "train"
    prepare(
        asked.format,
        asked.root,
        asked.split,
        source=asked.source,
        given=asked.labels,
        output=asked.output,
        packed=asked.root / f"{asked.split}.tar" if asked.pack is True else asked.pack,
        workers=asked.workers,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cosa_fast.prepare", description="Build a label file, check every image, pack the images."
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--root", required=True, type=_path, help="the data set's folder")
    parser.add_argument("--split", help="which list, e.g. train_aug (default of a folder: train, or all its images)")
    parser.add_argument(
        "--from", dest="source", choices=SOURCES, help="where labels come from (default: what is there)"
    )
    parser.add_argument(
        "--labels", metavar="FILE", type=_path, help="take the labels from this .npy, .json or .csv file"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=_path, help="the label file to write (default: ROOT/labels.json)"
    )
    parser.add_argument(
        "--pack",
        metavar="FILE",
        type=_path,
        nargs="?",
        const=True,
        help="also write the images into one tar (ROOT/SPLIT.tar)",
    )
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that decode images")
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser()


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
