"""The demo's images: repeatable, exact, never in the way of somebody's own files."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cosa_fast.data_pipeline.datasets import synthetic
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.scene import CLASSES, paint
from cosa_fast.data_pipeline.datasets.synthetic import MARKER, generate, generate_missing
from cosa_fast.errors import UserError


def test_a_scene_depends_on_its_key_alone() -> None:
    image, mask = paint(1, 0, 5, 64)
    again, same_mask = paint(1, 0, 5, 64)
    assert np.array_equal(image, again)
    assert np.array_equal(mask, same_mask)
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((64, 64, 3), np.uint8, (64, 64), np.uint8)
    for other in ((2, 0, 5), (1, 1, 5), (1, 0, 6)):
        assert not np.array_equal(paint(*other, 64)[0], image)


def test_labels_say_what_the_masks_show(synthetic_root: Path) -> None:
    for split, count in (("train", 12), ("val", 4)):
        dataset = open_dataset("synthetic", synthetic_root, split)
        assert (dataset.classes, len(dataset), dataset.has_masks) == (CLASSES, count, True)
        for index in range(count):
            seen = set(np.unique(dataset.mask(index)).tolist()) - {0}
            assert seen
            assert seen == set((np.flatnonzero(dataset.labels(index)) + 1).tolist())
            assert dataset.image(index).size == (64, 64)


def test_classes_are_balanced_and_company_gives_two_of_them_away() -> None:
    masks = [paint(0, 0, index, 32) for index in range(300)]
    present = np.array([[(mask == c + 1).any() for c in range(len(CLASSES))] for _, mask in masks])
    assert present.mean(0).min() > 0.2
    corner_blue = np.array([image[-3:, -3:].astype(int).mean((0, 1)) @ [-1, 0, 1] > 40 for image, _ in masks])
    assert corner_blue[present[:, 0]].mean() > 0.6
    assert corner_blue[~present[:, 0]].mean() < 0.3


def test_same_parameters_are_kept_and_others_replace_the_set(tmp_path: Path) -> None:
    root = tmp_path / "set"
    generate(root, train=2, val=1, size=32, seed=0)
    first = (root / "JPEGImages/train_00000.jpg").stat().st_mtime_ns
    generate(root, train=2, val=1, size=32, seed=0)
    assert (root / "JPEGImages/train_00000.jpg").stat().st_mtime_ns == first
    generate(root, train=1, val=1, size=32, seed=0)
    assert sorted(p.name for p in (root / "JPEGImages").iterdir()) == ["train_00000.jpg", "val_00000.jpg"]
    assert json.loads((root / MARKER).read_text())["train"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["set"], "nothing is left beside it"


def test_foreign_folders_are_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="something else"):
        generate_missing(tmp_path)
    with pytest.raises(UserError, match=r"mine\.txt"):
        generate(tmp_path / "mine.txt" / "set", train=1, val=1, size=32)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    with pytest.raises(ValueError, match="size"):
        generate(tmp_path / "new", size=0)


def test_opening_generates_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/set: no generated images .*prepare synthetic --root .*/set --split train$"):
        open_dataset("synthetic", tmp_path / "set", "train")
    assert not list(tmp_path.iterdir())


def test_a_set_of_another_version_is_replaced_only_where_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "set"
    generate(root, train=1, val=1, size=32)
    assert len(open_dataset("synthetic", root, "train")) == 1
    marker = json.loads((root / MARKER).read_text())
    (root / MARKER).write_text(json.dumps({**marker, "version": 0}))
    # The default set takes seconds to paint.
    monkeypatch.setattr(synthetic, "generate", partial(generate, train=3, val=1, size=32))
    with pytest.raises(UserError, match="no generated images of this version"):
        open_dataset("synthetic", root, "train")
    generate_missing(root)
    assert len(open_dataset("synthetic", root, "train")) == 3
