"""Check a data set, build its label file where it has none, and with --pack write its images into one file:
python -m cosa_fast.prepare voc --root ROOT --split train_aug --pack
python -m cosa_fast.prepare folder --root ROOT
python -m cosa_fast.prepare voc --download --root DIR
"""

import os
from argparse import Namespace
from pathlib import Path

from cosa_fast.cli import CommandLine, run_cli, whole
from cosa_fast.data_pipeline.datasets.opening import FORMATS, splits_of
from cosa_fast.data_pipeline.datasets.preparation import SOURCES, masks_from_colours, prepare
from cosa_fast.errors import UserError
from cosa_fast.files import nearest, require_place

_SBD = "sbd"
_EXAMPLE = "e.g. --split train"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, download and convert what is asked for, prepare a split, print the counts; 0 when all is
    right, and the tar, if one is asked for, written.
    """
    asked = _parser().parse_args(argv)
    format = _format(asked.what, asked.format)
    _check(asked, format)
    if asked.download:
        asked.root = _download(format, asked.root)
    elif format != "synthetic" and not asked.root.is_dir():
        what = "is no folder" if asked.root.exists() else f"no such folder{nearest(asked.root)}"
        raise UserError(f"--root {asked.root}: {what}; give the data set's folder")
    format = "voc" if format == _SBD else format
    if asked.masks_from_colours:
        default = {"folder": "train", "coco": "val2014"}.get(format, "val")
        masks_from_colours(format, asked.root, asked.split or default)
    if asked.split is None and _is_done_without(asked):
        return 0
    asked.split = asked.split or "train"  # of a folder
    prepare(
        format,
        asked.root,
        asked.split,
        source=asked.source,
        given=asked.labels,
        output=asked.output,
        packed=asked.root / f"{asked.split}.tar" if asked.pack is True else asked.pack,
        make_list=asked.make_list,
        workers=min(8, os.cpu_count() or 1) if asked.workers is None else asked.workers,
    )
    return 0


def _check(asked: Namespace, format: str) -> None:
    """UserError for what contradicts itself, has no effect or cannot be written, before anything is done."""
    if format == _SBD and not asked.download:
        raise UserError("sbd: can be downloaded only; what it adds to VOC2012 is prepared as voc")
    if asked.split is None and not _is_done_without(asked) and format != "folder":
        known = ", ".join(splits_of(format, asked.root)) if format in FORMATS else ""
        raise UserError(f"--split: which list of the {format} set? " + (f"there are {known}" if known else _EXAMPLE))
    npy = asked.source == "npy" and asked.labels is not None and asked.labels.suffix.lower() == ".npy"
    if asked.labels is not None and asked.source is not None and not npy:
        raise UserError(f"--labels {asked.labels} and --from {asked.source}: which of them? Give one")
    if asked.output is not None:
        require_place(asked.output, "-o")
    if isinstance(asked.pack, Path):
        require_place(asked.pack, "--pack")
        if asked.pack.suffix != ".tar":
            raise UserError(f"--pack {asked.pack}: a pack is a tar; choose a name that ends in .tar")
    if asked.make_list and (format not in ("voc", _SBD) or asked.split != "train_aug"):
        raise UserError(f"--make-list: makes the list train_aug of the format voc, not {asked.split} of {format}")


def _is_done_without(asked: Namespace) -> bool:
    """Whether what is asked for needs no split: a download, or colours made indices, and nothing more."""
    more = (asked.source, asked.labels, asked.output, asked.pack, asked.workers)
    alone = not asked.make_list and all(option is None for option in more)
    return alone and (asked.download or asked.masks_from_colours)


def _format(what: str | None, option: str | None) -> str:
    """The format, which may be given by its bare name or with --format."""
    if what and option and what != option:
        raise UserError(f"{what} and --format {option}: which of them? Give one")
    chosen = what or option
    if chosen is None:
        raise UserError(f"--format: one of {', '.join(FORMATS)}, or {_SBD} with --download; e.g. --format folder")
    return chosen


def _download(format: str, root: Path) -> Path:
    if format not in ("voc", _SBD):
        raise UserError(f"--download: gets voc or {_SBD}, not {format}")
    import cosa_fast.network.torchvision_compat  # noqa: F401 - torchvision may not be imported by itself
    from cosa_fast.data_pipeline.datasets.download import download_sbd, download_voc

    return (download_sbd if format == _SBD else download_voc)(root, print)


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m cosa_fast.prepare", description="Build a label file, check every image, pack the images."
    )
    parser.add_argument("what", nargs="?", choices=(*FORMATS, _SBD), metavar="FORMAT", help=f"as --format; or {_SBD}")
    parser.add_argument("--format", choices=FORMATS)
    parser.add_argument("--root", required=True, type=_path, help="the data set's folder")
    parser.add_argument("--split", help="which list, e.g. train_aug (default of a folder: train, or all its images)")
    parser.add_argument(
        "--from",
        dest="source",
        choices=SOURCES,
        help="take all labels from there, and write them (default: from what is there)",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        type=_path,
        help="take the labels from this .npy, .json or .csv file, and write them",
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
    parser.add_argument(
        "--download",
        action="store_true",
        help="first get voc, or sbd for the devkit at ROOT, from where it is published",
    )
    parser.add_argument(
        "--make-list", action="store_true", help="first write VOC's train_aug.txt: SegmentationClassAug less val"
    )
    parser.add_argument(
        "--masks-from-colours",
        "--masks-from-colors",
        action="store_true",
        help="first write masks that show classes as colours as indices",
    )
    parser.add_argument("--workers", type=whole(0), metavar="N", help="threads that decode images; default: up to 8")
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser()


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
