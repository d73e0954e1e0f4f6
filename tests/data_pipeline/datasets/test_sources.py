"""Every image has the label of the first source that has one for it: no source hides another."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.packed import write_pack
from cosa_fast.data_pipeline.datasets.sources import in_words
from cosa_fast.data_pipeline.datasets.voc import CLASSES
from cosa_fast.errors import UserError

TILE = Image.new("RGB", (6, 4), (90, 90, 90))
MakeVoc = Callable[..., Path]


def names_of(dataset: ImageDataset) -> list[str]:
    """The one class of each image, or the empty text of one without a label."""
    return [
        ";".join(dataset.classes[k] for k in np.flatnonzero(dataset.labels(index))) if dataset.has_label(index) else ""
        for index in range(len(dataset))
    ]


def annotate(root: Path, **names: str) -> None:
    (root / "Annotations").mkdir()
    for id, name in names.items():
        (root / "Annotations" / f"{id}.xml").write_text(
            f"<annotation><object><name>{name}</name></object></annotation>"
        )


def test_an_image_that_one_file_lacks_has_its_label_from_the_next(make_voc: MakeVoc) -> None:
    root, said = make_voc(dict.fromkeys("abcd", TILE), {"a": ["cat"]}), list[str]()
    np.save(root / "cls_labels_onehot.npy", {id: np.eye(20)[CLASSES.index("dog")] for id in "ab"}, allow_pickle=True)
    annotate(root, a="cow", b="cow", c="cow", d="sheep")
    dataset = open_dataset("voc", root, "train", say=said.append)
    assert names_of(dataset) == ["cat", "dog", "cow", "sheep"]
    words = f"{root}/labels.json (1), cls_labels_onehot.npy (1) and Annotations (2)"
    assert dataset.label_source == words
    assert any(f"4 images, labels from {words}: " in text for text in said)


def test_a_label_file_of_other_images_hides_nothing(make_voc: MakeVoc) -> None:
    root = make_voc(dict.fromkeys("ab", TILE), {"a": ["cat"]})
    annotate(root, b="cow")
    (root / "ImageSets/Segmentation/val.txt").write_text("b\n")
    dataset = open_dataset("voc", root, "val", need_labels=False)
    assert (names_of(dataset), dataset.label_source) == (["cow"], f"{root}/Annotations")


def test_a_further_source_that_cannot_be_used_is_said(make_voc: MakeVoc) -> None:
    """And is no obstacle to images that need no label."""
    root = make_voc(dict.fromkeys("ab", TILE), {"a": ["cat"]})
    annotate(root, b="unicorn")
    dataset = open_dataset("voc", root, "train", need_labels=False)
    assert names_of(dataset) == ["cat", ""]
    assert "Annotations is not used: " in dataset.notes[-1]
    with pytest.raises(UserError, match=r"labels\.json: no label for 1 of 2 .*Annotations is not used: .*'unicorn'"):
        open_dataset("voc", root, "train")
    annotate_all = {"a": ["cat"], "b": ["dog"]}
    (root / "labels.json").write_text(json.dumps(annotate_all))
    assert open_dataset("voc", root, "train").notes == (), "nothing that is not needed is read"


def write_folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        TILE.save(root / name)
    return root


def test_two_label_files_of_a_folder_complete_each_other(tmp_path: Path) -> None:
    root = write_folder(tmp_path, "a.jpg", "b.jpg")
    (root / "labels.json").write_text('{"a": ["cat"]}')
    (root / "labels.csv").write_text("a,dog\nb,fox\n")
    dataset = open_dataset("folder", root, "train")
    assert names_of(dataset) == ["cat", "fox"]
    assert dataset.label_source == f"{root}/labels.json (1) and labels.csv (1)"
    (root / "train.txt").write_text("a\n")
    assert open_dataset("folder", root, "train").classes == dataset.classes, "whatever the split"


def test_folders_that_are_classes_label_what_a_file_lacks(tmp_path: Path) -> None:
    """Other folders say nothing of what is on an image."""
    root = write_folder(tmp_path, "cat/a.jpg", "dog/b.jpg", "batch/c.jpg")
    (root / "labels.json").write_text('{"cat/a": ["dog"]}')
    dataset = open_dataset("folder", root, "train", need_labels=False)
    assert names_of(dataset) == ["", "dog", ""]
    (root / "classes.txt").write_text("cat\nDog\n")
    dataset = open_dataset("folder", root, "train", need_labels=False)
    assert names_of(dataset) == ["", "Dog", "Dog"], "by name: batch/c, cat/a, dog/b"


def test_classes_that_folders_name_are_those_of_all_splits(tmp_path: Path) -> None:
    root = write_folder(tmp_path, "cat/a.jpg", "dog/b.jpg", "fox/c.jpg")
    (root / "some.txt").write_text("cat/a\n")
    (root / "train.txt").write_text("cat/a\ndog/b\n")
    assert open_dataset("folder", root, "some").classes == ("cat", "dog")
    root = write_folder(tmp_path / "b", "train/cat/a.jpg", "train/dog/b.jpg", "val/cat/c.jpg", "test/unknown/d.jpg")
    assert open_dataset("folder", root, "val").classes == ("cat", "dog")


def test_a_pack_changes_no_classes(tmp_path: Path) -> None:
    root = write_folder(tmp_path, "train/cat/a.jpg", "val/fox/b.jpg")
    write_pack(root / "train.tar", [("cat/a.jpg", (root / "train/cat/a.jpg").read_bytes())])
    assert open_dataset("folder", root, "train", pack=root / "train.tar").classes == ("cat", "fox")


def test_places_are_told_apart_in_words() -> None:
    first, second = Path("set/ImageSets/onehot.npy"), Path("set/onehot.npy")
    assert in_words([first, second], [first, second, second]) == f"{first} (1) and {second} (2)"
    file, here = Path("labels.json"), Path(".")
    assert in_words([file, here], [file, here]) == "labels.json (1) and . (1)", "--root . with folders of classes"
