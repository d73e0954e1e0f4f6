"""Small data sets built on the spot, and the place of the real ones."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast.data_pipeline.datasets.synthetic import generate

REPOSITORY = Path(__file__).resolve().parents[2]


def shared(name: str) -> Path:
    """A folder of the real data; skips the test where it is absent."""
    path = Path(os.environ.get("COSA_SHARED", REPOSITORY.parent / "shared")) / "data" / name
    if not path.is_dir():
        pytest.skip(f"real data not found: {path} (set COSA_SHARED)")
    return path


@pytest.fixture
def voc_animals() -> Path:
    return shared("voc_animals")


@pytest.fixture
def tiny_coco() -> Path:
    return shared("tiny_coco")


@pytest.fixture(scope="session")
def synthetic_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated set, to be read only."""
    root = tmp_path_factory.mktemp("synthetic") / "set"
    generate(root, train=12, val=4, size=64, seed=3)
    return root


@pytest.fixture
def make_voc(tmp_path: Path) -> Callable[..., Path]:
    """Write a VOC folder with the given images (id -> PIL image or raw bytes), masks and labels; returns its root."""

    def make(
        images: dict[str, Image.Image | bytes],
        labels: dict[str, list[str]] | None = None,
        masks: dict[str, np.ndarray] | None = None,
        suffix: str = ".jpg",
    ) -> Path:
        root = tmp_path / "voc"
        for folder in ("JPEGImages", "ImageSets/Segmentation"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for id, image in images.items():
            path = root / "JPEGImages" / f"{id}{suffix}"
            if isinstance(image, bytes):
                path.write_bytes(image)
            else:
                image.save(path, quality=95)
        lines = [id if suffix == ".jpg" else f"/JPEGImages/{id}{suffix} /SegmentationClass/{id}.png" for id in images]
        (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(lines))
        if labels is not None:
            (root / "labels.json").write_text(json.dumps(labels))
        for id, mask in (masks or {}).items():
            (root / "SegmentationClass").mkdir(exist_ok=True)
            Image.fromarray(mask).save(root / "SegmentationClass" / f"{id}.png")
        return root

    return make
