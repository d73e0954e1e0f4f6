"""Images for evaluation: read ahead by either pipeline, at their own size, with their masks, in batches of one size."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.evaluation_stream import Loading, Shown, evaluation_stream
from cosa_fast.data_pipeline.views.pixels import normalise
from cosa_fast.errors import UserError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CPU = torch.device("cpu")


@pytest.fixture
def root(make_voc: Callable[..., Path]) -> Path:
    """Nine images of three sizes; one is a PNG in truth, one gray, one to be turned."""
    rng = np.random.default_rng(0)
    sizes = {f"i{k}": [(30, 40), (40, 30), (33, 21)][k % 3] for k in range(9)}
    images = {id: Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for id, size in sizes.items()}
    images["i4"] = images["i4"].convert("L")
    root = make_voc(images, None, {id: rng.integers(0, 3, size, np.uint8) for id, size in sizes.items()})
    images["i1"].save(root / "JPEGImages/i1.jpg", "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    images["i3"].transpose(Image.Transpose.ROTATE_90).save(root / "JPEGImages/i3.jpg", exif=exif)
    return root


@pytest.fixture
def dataset(root: Path) -> ImageDataset:
    return open_dataset("voc", root, "train", need_labels=False)


def read(
    dataset: ImageDataset, pipeline: str, batch_size: int, indices: list[int] | None = None, threads: int = 2
) -> list[Shown]:
    chosen = list(range(len(dataset))) if indices is None else indices
    loading = Loading(pipeline, threads)  # type: ignore[arg-type]
    return list(evaluation_stream(dataset, chosen, batch_size, MEAN, STD, CPU, loading))


def test_one_by_one_they_come_in_order_bit_for_bit(dataset: ImageDataset, pipeline: str) -> None:
    batches = read(dataset, pipeline, 1, [7, 1, 3, 4, 0])
    for index, (indices, images, truths, _) in zip([7, 1, 3, 4, 0], batches, strict=True):
        assert indices == [index]
        assert torch.equal(images[0], normalise(dataset.image(index), MEAN, STD))
        assert torch.equal(truths[0], torch.from_numpy(dataset.mask(index)))
        assert (len(images), images.is_contiguous()) == (1, True)


def test_batches_are_of_one_size_and_hold_every_image_once(dataset: ImageDataset, pipeline: str) -> None:
    batches = read(dataset, pipeline, 2)
    assert sorted(len(indices) for indices, *_ in batches) == [1, 1, 1, 2, 2, 2]
    found = {}
    for indices, images, truths, _ in batches:
        found |= {index: pair for index, *pair in zip(indices, images, truths, strict=True)}
    assert sorted(found) == list(range(len(dataset)))
    for index, (image, truth) in found.items():
        assert torch.equal(image, normalise(dataset.image(index), MEAN, STD))
        assert torch.equal(truth, torch.from_numpy(dataset.mask(index)))


@pytest.fixture
def read_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """File name -> the bytes read at each of its openings."""
    found: dict[str, list[int]] = {}

    class Counted(io.FileIO):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.log = found.setdefault(path.name, [])
            self.log.append(0)

        def readinto(self, buffer: Any) -> int | None:
            count = super().readinto(buffer)
            self.log[-1] += count or 0
            return count

        def readall(self) -> bytes:
            data = super().readall()
            self.log[-1] += len(data)
            return data

    def counted(file: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(file, Path) and file.suffix in (".jpg", ".png"):
            return io.BufferedReader(Counted(file))
        return plain(file, *arguments, **options)

    plain = open
    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", counted)
    return found


def test_every_file_is_read_once(make_voc: Callable[..., Path], pipeline: str, read_of: dict[str, list[int]]) -> None:
    """Grouping by size takes no more than the heads of the image files."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    images = {id: Image.fromarray(noise) for id in "abc"}
    root = make_voc(images, None, {id: np.zeros((200, 300), np.uint8) for id in images})
    dataset = open_dataset("voc", root, "train", need_labels=False)
    whole = {path.name: path.stat().st_size for path in root.rglob("*.*g")}
    assert min(size for name, size in whole.items() if name.endswith(".jpg")) > 50_000
    read_of.clear()
    read(dataset, pipeline, 1)
    assert read_of == {name: [size] for name, size in whole.items()}
    read_of.clear()
    (batch,) = read(dataset, pipeline, 3)
    assert len(batch[1]) == 3
    for name, (*heads, last) in read_of.items():
        assert last == whole[name]
        assert len(heads) == name.endswith(".jpg")
        assert sum(heads) <= 16_384


def test_nothing_to_read_is_an_empty_stream(dataset: ImageDataset, pipeline: str) -> None:
    """The share of a rank too many."""
    assert read(dataset, pipeline, 1, []) == []
    assert read(dataset, pipeline, 4, []) == []


@pytest.mark.parametrize("damage", ["image", "mask"])
def test_a_bad_file_is_named_after_all_before_it(root: Path, dataset: ImageDataset, pipeline: str, damage: str) -> None:
    path = root / ("JPEGImages/i5.jpg" if damage == "image" else "SegmentationClass/i5.png")
    path.write_bytes(path.read_bytes()[:-60])
    stream = evaluation_stream(dataset, range(9), 1, MEAN, STD, CPU, Loading(pipeline))  # type: ignore[arg-type]
    for _ in range(5):
        next(stream)
    with pytest.raises(UserError, match=path.name):
        next(stream)


def test_real_images_are_the_same_whoever_decodes(voc_animals: Path, pipeline: str) -> None:
    dataset = open_dataset("voc", voc_animals, "val", need_labels=False)
    for index, (_, images, *_) in enumerate(read(dataset, pipeline, 1, list(range(12)))):
        assert torch.equal(images[0], normalise(dataset.image(index), MEAN, STD))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_they_arrive_there(dataset: ImageDataset, pipeline: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    stream = evaluation_stream(dataset, range(9), 1, MEAN, STD, device, Loading(pipeline))  # type: ignore[arg-type]
    for index, (_, images, truths, _) in enumerate(stream):
        assert images.device == truths.device == device
        assert torch.equal(truths[0].cpu(), torch.from_numpy(dataset.mask(index)))
        steps = (images[0].cpu() - normalise(dataset.image(index), MEAN, STD)).abs() * 255 * min(STD)
        assert steps.mean() < (1 if pipeline == "dali" else 1e-4)
