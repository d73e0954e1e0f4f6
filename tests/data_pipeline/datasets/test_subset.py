"""Holding images out, and the part of a set that has masks."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import LabelTable
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.subset import hold_out, masked_part
from cosa_fast.errors import UserError

TILE = Image.new("RGB", (6, 4), (90, 90, 90))


def numbered(count: int) -> ImageDataset:
    ids = [f"image{k}" for k in range(count)]
    return ImageDataset(("cat",), ids, [Path(f"{id}.jpg") for id in ids])


def test_a_tenth_is_held_out_by_name_alone() -> None:
    training, held = hold_out(numbered(2000))
    assert set(training.ids).isdisjoint(held.ids)
    assert len(training) + len(held) == 2000
    assert 150 < len(held) < 250
    more = hold_out(numbered(3000))[1]
    assert set(held.ids) == {id for id in more.ids if int(id.removeprefix("image")) < 2000}, (
        "added images change nothing"
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_neither_part_is_ever_empty(count: int) -> None:
    training, held = hold_out(numbered(count))
    assert min(len(training), len(held)) >= 1
    with pytest.raises(UserError, match="one image"):
        hold_out(numbered(1))


def labelled(count: int, rare: dict[int, str]) -> ImageDataset:
    """`count` images of cats; those at the positions in `rare` show another class instead."""
    classes = ("cat", *dict.fromkeys(rare.values()))
    present = np.zeros((count, len(classes)), np.uint8)
    for position in range(count):
        present[position, classes.index(rare.get(position, "cat"))] = 1
    ids = [f"image{k}" for k in range(count)]
    table = LabelTable(present, np.ones(count, bool))
    return ImageDataset(classes, ids, [Path(f"{id}.jpg") for id in ids], table)


def test_the_only_image_of_a_class_stays_in_the_training() -> None:
    usual = [int(id.removeprefix("image")) for id in hold_out(numbered(200))[1].ids]
    first, second, third = usual[:3]
    said: list[str] = []
    training, held = hold_out(labelled(200, {first: "lynx", second: "fox", third: "fox"}), say=said.append)
    kept = {f"image{k}" for k in usual} - set(held.ids)
    assert f"image{first}" in kept
    assert len(kept) == 2, "one image of each class is enough"
    assert kept <= set(training.ids)
    assert said == [text for text in said if text.startswith("2 images kept in the training, the only ones")]
    assert f"image{first} (lynx)" in said[0]
    trained = next(k for k in range(200) if k not in usual)
    assert set(hold_out(labelled(200, {first: "lynx", trained: "lynx"}))[1].ids) == {f"image{k}" for k in usual}


def test_something_is_held_out_even_of_classes_with_one_image_each() -> None:
    usual = [int(id.removeprefix("image")) for id in hold_out(numbered(200))[1].ids]
    training, held = hold_out(labelled(200, {k: f"class {k}" for k in usual}))
    assert len(held) == 1
    assert len(training) == 199


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        TILE.save(tmp_path / f"{name}.jpg")
    (tmp_path / "labels.csv").write_text("a,cat\nb,dog\nc,cat\n")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.full((4, 6), 2, np.uint8)).save(tmp_path / "masks/b.png")
    return tmp_path


def test_the_part_with_masks_is_the_same_images(folder: Path) -> None:
    whole = open_dataset("folder", folder, "train")
    part = masked_part(whole)
    assert (part.ids, part.has_masks, part.classes) == (("b",), True, ("cat", "dog"))
    assert (part.mask(0) == 2).all()
    assert part.labels(0).tolist() == [0, 1]
    assert part.image_path(0) == whole.image_path(1)
    assert part.size(0) == (4, 6)
    assert part.encoded(0) == whole.encoded(1)
    assert part.fingerprint() != whole.fingerprint()


def test_class_folders_name_the_classes(tmp_path: Path) -> None:
    for name in ("cat/x.jpg", "dog/x.png", "dog/y.JPG", "masks/z.png", ".hidden/h.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        TILE.save(tmp_path / name)
    dataset = open_dataset("folder", tmp_path, "train")
    assert dataset.ids == ("cat/x", "dog/x", "dog/y")
    assert [dataset.labels(k).tolist() for k in range(3)] == [[1, 0], [0, 1], [0, 1]]
    (tmp_path / "labels.csv").write_text("cat/x.jpg,cat;dog\ndog/x.png,dog\ny.JPG,dog\n")
    assert open_dataset("folder", tmp_path, "train").labels(0).tolist() == [1, 1]


def test_class_folders_within_split_folders(tmp_path: Path) -> None:
    for name in ("train/cat/x.jpg", "train/dog/y.jpg", "val/cat/z.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        TILE.save(tmp_path / name)
    assert open_dataset("folder", tmp_path, "train").ids == ("cat/x", "dog/y")
    assert open_dataset("folder", tmp_path, "val").ids == ("cat/z",)
    with pytest.raises(UserError, match="no split 'vall'"):
        open_dataset("folder", tmp_path, "vall")
