"""The archive that the VOC test server takes: results/VOC2012/Segmentation/COMP_test_cls/ID.png in a .tgz."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cosa_fast.data_pipeline.datasets.voc import CLASSES
from cosa_fast.errors import UserError, counted
from cosa_fast.files import written_aside

# comp5: trained on VOC alone; comp6: with anything else, such as weights from ImageNet.
COMPETITIONS = ("comp5", "comp6")


def check_classes(classes: Sequence[str]) -> None:
    """UserError unless these are VOC's twenty, in its order: the server knows them by their indices."""
    if tuple(classes) != CLASSES:
        wrong = next((name for name, voc in zip(classes, CLASSES, strict=False) if name != voc), "their number")
        raise UserError(
            f"--voc-test: the server wants VOC's 20 classes in VOC's order, this checkpoint differs: {wrong}"
        )


def pack(masks: Mapping[str, Path], archive: Path, competition: str) -> None:
    """Put mask files, by image id, into the archive. UserError where it cannot be written."""
    with written_aside(archive) as aside, tarfile.open(aside, "w:gz") as tar:
        for name, mask in sorted(masks.items()):
            tar.add(mask, f"{folder(competition)}/{name}.png", filter=_anonymous)


def folder(competition: str) -> str:
    """Where the server looks for the masks."""
    return f"results/VOC2012/Segmentation/{competition}_test_cls"


def check(archive: Path, sizes: Mapping[str, tuple[int, int]], competition: str) -> None:
    """Read the archive back. sizes: (width, height) of every image by its id. UserError for a missing or foreign file,
    a mask of another size, one that is not of 8-bit indices, or one with something else than 0..20 in it."""
    found = set()
    with tarfile.open(archive) as tar:
        for entry in tar:
            place, _, name = entry.name.rpartition("/")
            if not entry.isfile() or place != folder(competition) or name.removesuffix(".png") not in sizes:
                raise UserError(f"{archive}: {entry.name} does not belong there; make the archive anew")
            id = name.removesuffix(".png")
            content = tar.extractfile(entry)
            with Image.open(io.BytesIO(content.read() if content else b"")) as image:
                values = np.array(image)
                if image.size != sizes[id] or image.mode not in ("P", "L") or values.max() > len(CLASSES):
                    raise UserError(
                        f"{archive}: {entry.name} is {image.width}x{image.height}, {image.mode}, up to {values.max()}; "
                        f"wanted {sizes[id][0]}x{sizes[id][1]}, P, up to {len(CLASSES)}"
                    )
            found.add(id)
    missing = sorted(set(sizes) - found)
    if missing:
        raise UserError(
            f"{archive}: {counted(len(missing), 'image')} missing, the first is {missing[0]}; predict them all"
        )


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry
