"""Images that cannot be read: the run stops and names the file, or goes on without it, the same in both pipelines."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.data_pipeline.views.parameters import AugmentConfig
from cosa_fast.errors import UserError

BAD = ("i3", "i4", "i9")
OpenStream = Callable[..., Iterable[Batch]]


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
    return ids(list(islice(TorchPipeline(open_dataset("voc", root, "train"), AugmentConfig(crop_size=48), 4, 7), 6)))


def test_the_next_readable_image_takes_the_place(open_stream: OpenStream, dataset: ImageDataset, root: Path) -> None:
    seen = ids(list(islice(open_stream(dataset, 4, unreadable="skip"), 6)))
    instead = {"i3": "i5", "i4": "i5", "i9": "i10"}
    assert seen == [instead.get(id, id) for id in whole_order(root)]


def test_each_bad_file_is_named_once(
    open_stream: OpenStream, dataset: ImageDataset, capfd: pytest.CaptureFixture[str]
) -> None:
    list(islice(open_stream(dataset, 4, unreadable="skip", threads=2), 9))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == len(BAD)
    assert all(any(f"{id}.jpg: " in line for line in lines) for id in BAD)


def test_the_choice_depends_on_nothing_but_the_files(open_stream: OpenStream, dataset: ImageDataset) -> None:
    whole = list(islice(open_stream(dataset, 6, unreadable="skip"), 6))
    resumed = list(islice(open_stream(dataset, 6, unreadable="skip", start=12, threads=2), 4))
    parts = [list(islice(open_stream(dataset, 6, unreadable="skip", rank=rank, ranks=2), 6)) for rank in (0, 1)]
    for batch, again in zip(whole[2:], resumed, strict=True):
        assert batch.ids == again.ids
        assert torch.equal(batch.strong, again.strong)
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(batch.weak, torch.cat([piece.weak for piece in pieces]))


@pytest.mark.usefixtures("dali")
def test_both_pipelines_skip_alike(dataset: ImageDataset) -> None:
    from cosa_fast.data_pipeline.dali.pipeline import DaliPipeline

    common = (dataset, AugmentConfig(crop_size=32), 4, 7)
    ours = DaliPipeline(*common, device=torch.device("cpu"), unreadable="skip")
    for a, b in islice(zip(ours, TorchPipeline(*common, unreadable="skip"), strict=True), 6):
        assert a.ids == b.ids
        assert torch.equal(a.valid, b.valid)
        assert (a.weak - b.weak).abs().mean() < 0.02


def test_without_being_told_to_skip_the_stream_stops(open_stream: OpenStream, dataset: ImageDataset) -> None:
    with pytest.raises(UserError) as caught:
        list(islice(open_stream(dataset, 4), 3))
    message = str(caught.value)
    assert any(f"{id}.jpg: " in message for id in BAD)
    assert "\n" not in message


def test_a_set_without_one_readable_image_is_an_error(open_stream: OpenStream, make_voc: Callable[..., Path]) -> None:
    root = make_voc({"a": b"nothing", "b": b""}, {"a": ["cat"], "b": ["cat"]})
    with pytest.raises(UserError, match="none of 2 images can be read"):
        list(islice(open_stream(open_dataset("voc", root, "train"), 2, unreadable="skip"), 1))
