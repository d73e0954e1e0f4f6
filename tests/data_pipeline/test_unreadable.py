"""Images that cannot be read: the run stops and names the file, or goes on without it, the same in both pipelines."""

import importlib.util
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.data_pipeline.views.parameters import AugmentConfig
from cosa_fast.errors import UserError

CONFIG = AugmentConfig(crop_size=32)
BAD = ("i3", "i4", "i9")


def torch_stream(dataset: ImageDataset, batch_size: int, **options: Any) -> TorchPipeline:
    return TorchPipeline(dataset, CONFIG, batch_size, 7, workers=options.pop("threads", 0), **options)


def dali_stream(dataset: ImageDataset, batch_size: int, **options: Any) -> Any:
    from cosa_fast.data_pipeline.dali.pipeline import DaliPipeline

    return DaliPipeline(dataset, CONFIG, batch_size, 7, device=torch.device("cpu"), **options)


Stream = Callable[..., Any]
WITHOUT_DALI = pytest.mark.skipif(
    importlib.util.find_spec("nvidia.dali") is None if importlib.util.find_spec("nvidia") else True,
    reason="DALI is not installed (the extra [dali])",
)
both = pytest.mark.parametrize("stream", [torch_stream, pytest.param(dali_stream, marks=WITHOUT_DALI)])


@pytest.fixture
def root(make_voc: Callable[..., Path]) -> Path:
    """Twelve images: i3 is cut short, i4 is no image, i9 is gone as soon as the set is open."""
    images: dict[str, Image.Image | bytes] = {
        f"i{k}": Image.linear_gradient("L").resize((40 + k, 30)).convert("RGB") for k in range(12)
    }
    root = make_voc(images, {id: ["cat"] for id in images})
    whole = (root / "JPEGImages/i3.jpg").read_bytes()
    (root / "JPEGImages/i3.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "JPEGImages/i4.jpg").write_bytes(b"\xff\xd8 not a picture \xff\xd9")
    return root


@pytest.fixture
def dataset(root: Path) -> ImageDataset:
    dataset = open_dataset("voc", root, "train")
    (root / "JPEGImages/i9.jpg").unlink()
    return dataset


def ids(batches: list[Batch]) -> list[str]:
    return [id for batch in batches for id in batch.ids]


def whole_order(root: Path) -> list[str]:
    """The ids of two epochs as they would be without damage."""
    for k in BAD:
        Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{k}.jpg")
    return ids(list(islice(torch_stream(open_dataset("voc", root, "train"), 4), 6)))


@both
def test_the_next_readable_image_takes_the_place(stream: Stream, dataset: ImageDataset, root: Path) -> None:
    seen = ids(list(islice(stream(dataset, 4, unreadable="skip"), 6)))
    instead = {"i3": "i5", "i4": "i5", "i9": "i10"}
    assert seen == [instead.get(id, id) for id in whole_order(root)]


@both
def test_each_bad_file_is_named_once(stream: Stream, dataset: ImageDataset, capfd: pytest.CaptureFixture[str]) -> None:
    list(islice(stream(dataset, 4, unreadable="skip", threads=2), 9))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == len(BAD)
    assert all(any(f"{id}.jpg: " in line for line in lines) for id in BAD)


@both
def test_the_choice_depends_on_nothing_but_the_files(stream: Stream, dataset: ImageDataset) -> None:
    whole = list(islice(stream(dataset, 6, unreadable="skip"), 6))
    resumed = list(islice(stream(dataset, 6, unreadable="skip", start=12, threads=2), 4))
    parts = [list(islice(stream(dataset, 6, unreadable="skip", rank=rank, ranks=2), 6)) for rank in (0, 1)]
    for batch, again in zip(whole[2:], resumed, strict=True):
        assert batch.ids == again.ids
        assert torch.equal(batch.strong, again.strong)
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(batch.weak, torch.cat([piece.weak for piece in pieces]))


@WITHOUT_DALI
def test_both_pipelines_skip_alike(dataset: ImageDataset) -> None:
    pairs = zip(dali_stream(dataset, 4, unreadable="skip"), torch_stream(dataset, 4, unreadable="skip"), strict=True)
    for ours, other in islice(pairs, 6):
        assert ours.ids == other.ids
        assert torch.equal(ours.valid, other.valid)
        assert (ours.weak - other.weak).abs().mean() < 0.02


@both
def test_without_being_told_to_skip_the_stream_stops(stream: Stream, dataset: ImageDataset) -> None:
    with pytest.raises(UserError) as caught:
        list(islice(stream(dataset, 4), 3))
    message = str(caught.value)
    assert any(f"{id}.jpg: " in message for id in BAD)
    assert "\n" not in message


@both
def test_a_set_without_one_readable_image_is_an_error(stream: Stream, make_voc: Callable[..., Path]) -> None:
    root = make_voc({"a": b"nothing", "b": b""}, {"a": ["cat"], "b": ["cat"]})
    with pytest.raises(UserError, match="not one of the 2 images can be read"):
        list(islice(stream(open_dataset("voc", root, "train"), 2, unreadable="skip"), 1))
