"""The demo's data set: generated scenes (see scene.py) written in VOC layout, with exact masks."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cosa_fast.data_pipeline.datasets.labels import write_labels
from cosa_fast.data_pipeline.datasets.layout import Layout
from cosa_fast.data_pipeline.datasets.packed import Pack
from cosa_fast.data_pipeline.datasets.scene import CLASSES, paint
from cosa_fast.data_pipeline.datasets.voc import LISTS, find_voc
from cosa_fast.errors import UserError

TRAIN = 400
VAL = 100
SIZE = 128
SEED = 0

MARKER = "synthetic.json"
_VERSION = 1  # raise it when the same parameters give other images

_SPLITS = ("train", "val")
_PALETTE = (0, 0, 0, 220, 40, 40, 240, 200, 40, 200, 60, 200, 40, 180, 220, 60, 180, 60)


def find_synthetic(root: Path, split: str, classes: Sequence[str] | None, pack: Pack | None) -> Layout:
    """Where the things of a split are. UserErrors as in `find_voc`, and unless a set of this version is there: whoever
    looks at a network is not to write hundreds of images on the way.
    """
    if not _is_there(root):
        raise UserError(
            f"{root}: no generated images of this version there; they are made by a training, and by: "
            f"python -m cosa_fast.prepare synthetic --root {root} --split train"
        )
    return find_voc(root, split, classes, pack)


def generate_missing(root: str | Path) -> None:
    """Generate the default set unless a set of this version is there. UserErrors as in `generate`."""
    if not _is_there(Path(root).expanduser()):
        generate(Path(root).expanduser())


def generate(root: str | Path, *, train: int = TRAIN, val: int = VAL, size: int = SIZE, seed: int = SEED) -> None:
    """Write `train` + `val` square images of side `size` to `root`: JPEGImages, SegmentationClass, lists, classes.txt,
    labels.json and a marker.

    Image i of a split depends on (seed, split, i, size) alone. If the marker in `root` has the same parameters, nothing
    is done; with others the whole set is replaced, all at once by a rename. UserError if `root` holds something else or
    cannot be written. ValueError for train, val or size < 1.
    """
    for name, value in (("train", train), ("val", val), ("size", size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; wanted at least 1")
    root = Path(root)
    parameters = {"version": _VERSION, "train": train, "val": val, "size": size, "seed": seed}
    present = _read_marker(root)
    if present == parameters:
        return
    if present is None and root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(
            f"{root}: holds something else than generated images; give another data.root=... to generate into"
        )
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
            _write(Path(scratch) / "new", parameters)
            _replace(root, Path(scratch), parameters)
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror or error}); give another data.root=...") from None


def _write(root: Path, parameters: dict[str, int]) -> None:
    labels: dict[str, list[str]] = {}
    for folder in ("JPEGImages", "SegmentationClass", LISTS):
        (root / folder).mkdir(parents=True)
    for stream, split in enumerate(_SPLITS):
        ids = [f"{split}_{index:05d}" for index in range(parameters[split])]
        for index, id in enumerate(ids):
            labels[id] = _write_scene(root, id, stream, index, parameters)
        (root / LISTS / f"{split}.txt").write_text("\n".join(ids) + "\n")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    write_labels(root / "labels.json", labels)
    (root / MARKER).write_text(json.dumps(parameters) + "\n")


def _write_scene(root: Path, id: str, stream: int, index: int, parameters: dict[str, int]) -> list[str]:
    pixels, mask = paint(parameters["seed"], stream, index, parameters["size"])
    Image.fromarray(pixels).save(root / "JPEGImages" / f"{id}.jpg", quality=95)
    indexed = Image.fromarray(mask)
    indexed.putpalette(_PALETTE)
    indexed.save(root / "SegmentationClass" / f"{id}.png")
    return [name for number, name in enumerate(CLASSES, 1) if (mask == number).any()]


def _replace(root: Path, scratch: Path, parameters: dict[str, int]) -> None:
    if _read_marker(root) == parameters:
        return  # another process was faster
    if root.exists():
        root.rename(scratch / "old")
    (scratch / "new").rename(root)


def _is_there(root: Path) -> bool:
    parameters = _read_marker(root)
    return parameters is not None and parameters.get("version") == _VERSION


def _read_marker(root: Path) -> dict[str, int] | None:
    try:
        content = json.loads((root / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
