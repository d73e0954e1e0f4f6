"""Small data sets built on the spot, the place of the real ones, and both pipelines."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.synthetic import generate
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.data_pipeline.views.parameters import AugmentConfig

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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def dali() -> None:
    """Skips the test where DALI is absent."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra [dali])")


@pytest.fixture(params=["torch", "dali"])
def pipeline(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        request.getfixturevalue("dali")
    return request.param


@pytest.fixture
def open_stream(pipeline: str) -> Callable[..., Iterable[Batch]]:
    """Open either pipeline on the CPU. threads: worker processes of the torch pipeline."""

    def open_it(
        dataset: ImageDataset, batch_size: int = 5, *, crop: int = 48, threads: int = 0, **options: Any
    ) -> Iterable[Batch]:
        views = AugmentConfig(crop_size=crop, padding=options.pop("padding", "mean"))
        common = (dataset, views, batch_size, options.pop("seed", 7))
        if pipeline == "torch":
            return TorchPipeline(*common, workers=threads, **options)
        from cosa_fast.data_pipeline.dali.pipeline import DaliPipeline

        return DaliPipeline(*common, device=torch.device("cpu"), threads=threads or 1, **options)

    return open_it


@pytest.fixture(scope="session")
def equal() -> Callable[[Batch, Batch], bool]:
    """Whether two batches hold the same, bit for bit."""

    def compare(a: Batch, b: Batch) -> bool:
        tensors = ((a.weak, b.weak), (a.strong, b.strong), (a.labels, b.labels), (a.valid, b.valid))
        return a.ids == b.ids and all(torch.equal(x, y) for x, y in tensors)

    return compare
