"""PASCAL VOC 2012 and SBD from where they are published, by torchvision's downloaders, which compare checksums.

The caller has made torchvision importable (beside a CPU-only torch it is not by itself).
"""

import shutil
import tarfile
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cosa_fast.data_pipeline.datasets.layout import file_names
from cosa_fast.data_pipeline.datasets.masks import voc_palette
from cosa_fast.data_pipeline.datasets.voc import IMAGES, LISTS, MASKS, build_train_aug, devkit
from cosa_fast.errors import UserError, counted, first_line

# Bytes on the disk when all is done, archive and its content together.
VOC_BYTES = 4_200_000_000
SBD_BYTES = 3_300_000_000
_SBD_PARTS = ("cls", "img", "inst", "train.txt", "val.txt", "benchmark_RELEASE")


def download_voc(root: Path, say: Callable[[str], None]) -> Path:
    """VOC2012's trainval images, masks, annotations and lists into ROOT/VOCdevkit/VOC2012, whose path is returned; what
    is there already is not loaded again. UserError: no room, no connection, or another checksum than the published one.
    """
    from torchvision.datasets import VOCSegmentation

    root = _above(root)
    there = devkit(root)
    if (there / IMAGES).is_dir() and (there / MASKS[1]).is_dir():
        say(f"{there}: is there already")
        return there
    _require_room(root, VOC_BYTES, "VOC2012")
    _downloaded(root, lambda: VOCSegmentation(str(root), year="2012", image_set="train", download=True))
    there = devkit(root)
    say(f"{there}: {counted(len(file_names(there / IMAGES)), 'image')}")
    return there


def download_sbd(root: Path, say: Callable[[str], None]) -> Path:
    """SBD into ROOT/SBD, and from it VOC's SegmentationClassAug (VOC's own masks where it has one) and train_aug.txt in
    the devkit at or below `root`, whose path is returned. UserError as in `download_voc`; no devkit there; scipy, which
    reads SBD's masks, is not installed; or not so many images as train_aug has.
    """
    root = _above(root)
    there = devkit(root)
    if not (there / MASKS[1]).is_dir():
        raise UserError(
            f"{there}: no {MASKS[1]} there, which SBD adds to; get VOC2012 first with: "
            f"python -m cosa_fast.prepare voc --download --root {root}"
        )
    folder = root / "SBD"
    dataset = _open_sbd(folder)
    masks = _augmented(there, dataset, say)
    say(f"{masks}: {counted(len(file_names(masks)), 'mask')}")
    if not (there / LISTS / "train_aug.txt").is_file():
        say(f"{build_train_aug(there)}: written")
    return there


def _above(root: Path) -> Path:
    """The folder in which VOCdevkit/VOC2012 is to be: `root`, or that above where `root` is the devkit itself."""
    parts = root.absolute().parts
    for below in (("VOCdevkit", "VOC2012"), ("VOCdevkit",)):
        if parts[-len(below) :] == below:
            return root.absolute().parents[len(below) - 1]
    return root


def _open_sbd(folder: Path) -> Any:
    from torchvision.datasets import SBDataset

    there = (folder / "val.txt").is_file()  # what is unpacked last
    if not there:
        _require_room(folder, SBD_BYTES, "SBD")
        for part in _SBD_PARTS:  # of a download that was broken off
            shutil.rmtree(folder / part, ignore_errors=True)
            (folder / part).unlink(missing_ok=True)
    return _downloaded(
        folder, lambda: SBDataset(str(folder), image_set="train", mode="segmentation", download=not there)
    )


def _augmented(root: Path, sbd: Any, say: Callable[[str], None]) -> Path:
    """Write SegmentationClassAug, all at once; one that is there stays."""
    masks = root / MASKS[0]
    if masks.is_dir():
        say(f"{masks}: is there already, and stays")
        return masks
    scratch = root / f".{MASKS[0]}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        shutil.copytree(root / MASKS[1], scratch)
        own = file_names(scratch)
        for path in sorted((Path(sbd.root) / "cls").glob("*.mat")):
            if f"{path.stem}.png" not in own:
                _sbd_mask(sbd, path).save(scratch / f"{path.stem}.png")
        scratch.rename(masks)
    except OSError as error:
        raise UserError(f"{masks}: cannot be written ({error.strerror or error}); make room") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return masks


def _sbd_mask(sbd: Any, path: Path) -> Image.Image:
    try:
        mask = Image.fromarray(np.asarray(sbd._get_segmentation_target(str(path)), np.uint8))
    except Exception as error:  # scipy's reader fails in many ways
        raise UserError(
            f"{path}: no mask of SBD ({first_line(error)}); remove {path.parents[1]} and run again"
        ) from None
    mask.putpalette(voc_palette().tobytes())
    return mask


def _downloaded(root: Path, load: Callable[[], Any]) -> Any:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return load()
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"{root}: the download failed ({first_line(error)}); run again, or put the archive there yourself"
        ) from None
    except RuntimeError as error:  # torchvision's words for a checksum, and for scipy
        if "scipy" in str(error).lower():
            raise UserError("SBD's masks are MATLAB files; install their reader with: pip install scipy") from None
        raise UserError(
            f"{root}: what was downloaded has not the published checksum ({first_line(error)}); run again"
        ) from None
    except (OSError, EOFError, tarfile.TarError, shutil.Error) as error:
        raise UserError(f"{root}: cannot be unpacked ({first_line(error)}); make room, and run again") from None


def _require_room(root: Path, needed: int, name: str) -> None:
    """UserError unless the disk has so many bytes left."""
    place = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place}: {name} needs {needed / 1e9:.1f} GB with its archive, and {free / 1e9:.1f} GB are free; "
            "make room or choose another --root"
        )
