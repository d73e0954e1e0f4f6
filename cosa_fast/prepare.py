"""Build the label file of a data set, check its images, and with --pack write them into one file:
python -m cosa_fast.prepare --format voc --root ROOT --split train_aug --pack
"""

import argparse
import os
from pathlib import Path

from cosa_fast.cli import run_cli
from cosa_fast.data_pipeline.datasets.opening import FORMATS
from cosa_fast.data_pipeline.datasets.preparation import (
    SOURCES,
    pack,
    prepare,
    report,
    write_merged,
)
from cosa_fast.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, prepare, print the counts; 0 when the label file, and the pack if one is asked for, are
    written.
    """
    arguments = _parser().parse_args(argv)
    if arguments.workers < 0:
        raise UserError(f"--workers is {arguments.workers}; wanted 0 or more")
    root = Path(arguments.root).expanduser()
    packed = None
    if arguments.pack is not None:
        packed = Path(arguments.pack or root / f"{arguments.split}.tar").expanduser()
        if packed.suffix != ".tar":
            raise UserError(f"--pack {packed}: a pack is a tar; choose a name that ends in .tar")
    output = Path(arguments.output).expanduser() if arguments.output else root / "labels.json"
    given = Path(arguments.labels).expanduser() if arguments.labels else None
    dataset, labels = prepare(
        arguments.format, root, arguments.split, source=arguments.source, given=given, workers=arguments.workers
    )
    kept = write_merged(output, labels)
    print(report(dataset, labels))
    print(f"{output}: {len(labels)} images of {arguments.split}" + (f", {kept} others kept" if kept else ""))
    if packed is not None:
        print(pack(dataset, arguments.split, packed))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cosa_fast.prepare", description="Build a label file, check every image, pack the images."
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--root", required=True, help="the data set's folder")
    parser.add_argument("--split", required=True, help="which list, e.g. train_aug")
    parser.add_argument(
        "--from", dest="source", choices=SOURCES, help="where labels come from (default: what is there)"
    )
    parser.add_argument("--labels", metavar="FILE", help="take the labels from this .npy, .json or .csv file")
    parser.add_argument("-o", "--output", metavar="FILE", help="the label file to write (default: ROOT/labels.json)")
    parser.add_argument(
        "--pack", metavar="FILE", nargs="?", const="", help="also write the images into one tar (ROOT/SPLIT.tar)"
    )
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
