"""PASCAL VOC as people have it: each form of folder, list, image and label is understood, or refused with its file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast.data_pipeline.datasets import voc
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import ImageNames, read_labels
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.errors import UserError
from cosa_fast.prepare import main

TILE = Image.new("RGB", (6, 4), (90, 90, 90))
CAT = ["cat"]


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Four images of as many suffixes with XML annotations: one cat, one dog, one of both, one of neither."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "ImageSets/Segmentation", "ImageSets/Main", "Annotations"):
        (root / folder).mkdir(parents=True)
    for name in ("2007_000001.jpg", "2007_000002.JPG", "2008_000003.jpeg", "2008_000004.png"):
        TILE.save(root / "JPEGImages" / name)
    for id, names in {
        "2007_000001": CAT,
        "2007_000002": ["dog"],
        "2008_000003": ["cat", "dog"],
        "2008_000004": [],
    }.items():
        objects = "".join(f"<object><name>{name}</name></object>" for name in names)
        (root / "Annotations" / f"{id}.xml").write_text(f"<annotation>{objects}</annotation>")
    listed(root, "train", "2007_000001\n2007_000002\n2008_000003\n2008_000004\n")
    return root


def listed(root: Path, split: str, text: str, place: str = "Segmentation") -> None:
    (root / "ImageSets" / place / f"{split}.txt").write_text(text)


def masked(root: Path, folder: str, *names: str, value: int = 8) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.full((4, 6), value, np.uint8)).save(root / folder / name)


def opened(root: Path, split: str = "train") -> tuple[ImageDataset, list[str]]:
    said: list[str] = []
    return open_dataset("voc", root, split, say=said.append), said


def names_of(dataset: ImageDataset) -> list[list[str]]:
    return [[dataset.classes[k] for k in np.flatnonzero(dataset.labels(i))] for i in range(len(dataset))]


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_a_folder_above_the_devkit_is_understood_and_said(devkit: Path, levels: int) -> None:
    given = [devkit, devkit.parent, devkit.parent.parent][levels]
    dataset, said = opened(given)
    assert len(dataset) == 4
    assert any(f"{devkit} below" in text for text in said) is bool(levels)


def test_of_several_years_2012_is_taken_and_others_must_be_named(devkit: Path) -> None:
    devkit.rename(devkit.parent / "VOC2008")
    assert len(opened(devkit.parent)[0]) == 4
    (devkit.parent / "VOC2007/JPEGImages").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds VOC2008, VOC2007; name one of them with data\.root="):
        opened(devkit.parent)
    (devkit.parent / "VOC2008").rename(devkit)
    assert len(opened(devkit.parent)[0]) == 4


def test_images_of_any_suffix_are_found(devkit: Path) -> None:
    dataset, _ = opened(devkit)
    assert [dataset.image_path(k).suffix for k in range(4)] == [".jpg", ".JPG", ".jpeg", ".png"]
    assert all(dataset.image(k).size == (6, 4) for k in range(4))


def test_two_images_of_one_name_need_their_suffix(devkit: Path) -> None:
    TILE.save(devkit / "JPEGImages/2008_000004.bmp")
    with pytest.raises(UserError, match=r"train\.txt: 2008_000004 may be .*\.bmp or .*\.png; write the suffix"):
        opened(devkit)
    listed(devkit, "train", "2008_000004.png\n")
    assert opened(devkit)[0].image_path(0).suffix == ".png"


@pytest.mark.parametrize(
    "line",
    [
        "2007_000001",
        "2007_000001.jpg",
        "2007_000001.png",  # another suffix than the file's
        "JPEGImages/2007_000001.jpg",
        "/JPEGImages/2007_000001.jpg /SegmentationClass/2007_000001.png",
        "JPEGImages/2007_000001.jpg\tSegmentationClass/2007_000001.png",
        "JPEGImages\\2007_000001.jpg,SegmentationClass\\2007_000001.png",
        "/somewhere/else/VOC2012/JPEGImages/2007_000001.jpg",
        "./2007_000001.jpg",
        "2007_000001.jpg 2007_000001.png",
        "  2007_000001  ",
    ],
)
def test_every_form_of_a_line(devkit: Path, line: str) -> None:
    listed(devkit, "train", f"{line}\r\n")
    masked(devkit, "SegmentationClass", "2007_000001.png")
    dataset, _ = opened(devkit)
    assert (dataset.ids, dataset.image_path(0).name) == (("2007_000001",), "2007_000001.jpg")
    assert (dataset.mask(0) == 8).all()


def test_the_mask_that_a_list_names_is_taken(devkit: Path) -> None:
    listed(devkit, "train", "JPEGImages/2007_000001.jpg other/m.png\nJPEGImages/2007_000002.JPG other/gone.png\n")
    masked(devkit, "other", "m.png", value=3)
    masked(devkit, "SegmentationClass", "2007_000001.png", "2007_000002.png")
    dataset, _ = opened(devkit)
    assert [int(dataset.mask(k).max()) for k in range(2)] == [3, 8]


@pytest.mark.parametrize("line", [",", ".", "/", "JPEGImages", "..", ". .", "JPEGImages/..jpg"])
def test_a_line_without_a_name_is_a_missing_image(devkit: Path, line: str) -> None:
    listed(devkit, "train", line)
    with pytest.raises(UserError, match=r"train\.txt"):
        opened(devkit)


@pytest.mark.parametrize(
    "line", ["2007_000001 cat", "2007_000001 7", "2007_000001 1 1", "2007_000001 -1\n2007_000002 cat"]
)
def test_another_second_column_is_refused_with_the_line(devkit: Path, line: str) -> None:
    listed(devkit, "train", line)
    with pytest.raises(UserError, match=r"train\.txt: '2007_00000. .*' is neither an image, nor an image and its mask"):
        opened(devkit)


@pytest.mark.parametrize("split", ["cat_train", "Main/cat_train"])
def test_the_second_column_of_a_class_list_is_membership(devkit: Path, split: str) -> None:
    listed(devkit, "cat_train", "2007_000001  1\n2007_000002 -1\n2008_000003  0\n2008_000004 -1\n", "Main")
    dataset, said = opened(devkit, split)
    assert dataset.ids == ("2007_000001", "2008_000003")
    assert any("2 of 4 images of cat_train.txt: those with 1 or 0 (difficult)" in text for text in said)
    listed(devkit, "cat_train", "2007_000002 -1\n", "Main")
    with pytest.raises(UserError, match="every image has -1"):
        opened(devkit, split)


def test_a_list_of_main_is_a_split(devkit: Path) -> None:
    listed(devkit, "trainval", "2008_000004\n", "Main")
    assert opened(devkit, "trainval")[0].ids == ("2008_000004",)


@pytest.mark.parametrize(
    "text",
    [
        '<annotation xmlns="http://example.org/voc"><object><name>cat</name></object></annotation>',
        '<v:annotation xmlns:v="urn:voc"><v:object><v:name> cat </v:name></v:object></v:annotation>',
        "<root><annotation><objects><object><pose/><name>Cat</name></object></objects></annotation></root>",
        "<annotation><object><name>cat</name><part><name>head</name></part></object></annotation>",
        "<?xml version='1.0' encoding='ISO-8859-1'?><annotation><!-- é --><object><name>cat</name>"
        "<difficult>1</difficult></object><object><name>cat</name></object></annotation>",
    ],
)
def test_every_form_of_an_annotation(devkit: Path, text: str) -> None:
    (devkit / "Annotations/2007_000001.xml").write_text(text, encoding="latin-1")
    assert names_of(opened(devkit)[0]) == [["cat"], ["dog"], ["cat", "dog"], []]


def test_an_object_without_a_name_is_refused(devkit: Path) -> None:
    (devkit / "Annotations/2007_000001.xml").write_text("<annotation><object><pose/></object></annotation>")
    with pytest.raises(UserError, match=r"2007_000001\.xml: an object without a name"):
        opened(devkit)


@pytest.mark.parametrize("kind", [int, np.int64, lambda id: id[:4] + "_" + id[4:], str.encode, np.str_, np.bytes_])
def test_keys_of_any_type_in_a_one_hot_file(tmp_path: Path, kind: Callable) -> None:
    ids = ["2007000001", "2008000003"]
    written = {True: [kind(id) for id in ids], False: [kind(id[:4] + "_" + id[4:]) for id in ids]}
    keys = written[kind in (int, np.int64) or not isinstance(kind, type | type(str.encode))]
    path = tmp_path / "cls_labels_onehot.npy"
    np.save(path, dict(zip(keys, np.eye(2, dtype=np.float32), strict=True)), allow_pickle=True)
    names = ImageNames(("2007_000001", "2008_000003", "2008_000004"), complete=True)
    assert read_labels(path, ("cat", "dog"), names) == {"2007_000001": ("cat",), "2008_000003": ("dog",)}


def test_numbers_may_be_the_ends_of_names(tmp_path: Path) -> None:
    path = tmp_path / "labels.npy"
    np.save(path, {42: np.ones(1)}, allow_pickle=True)
    assert read_labels(path, CAT, ImageNames(("COCO_val2014_000000000042", "COCO_val2014_000000000420"))) == {
        "COCO_val2014_000000000042": ("cat",)
    }
    with pytest.raises(UserError, match="the number 42 may be a_42 or b_042"):
        read_labels(path, CAT, ImageNames(("a_42", "b_042")))
    np.save(path, {"a": np.ones(1), b"a.jpg": np.ones(1)}, allow_pickle=True)
    with pytest.raises(UserError, match="the image a is there twice"):
        read_labels(path, CAT, ImageNames(("a",)))


def test_masks_are_taken_from_either_folder(devkit: Path) -> None:
    """Who has unpacked the augmented masks of the training images alone still evaluates."""
    masked(devkit, "SegmentationClassAug", "2007_000001.png", value=3)
    masked(devkit, "SegmentationClass", "2007_000001.png", "2007_000002.png")
    dataset, _ = opened(devkit)
    assert [int(dataset.mask(k).max()) for k in range(2)] == [3, 8]
    assert [dataset.has_mask(k) for k in range(4)] == [True, True, False, False]


def test_the_augmented_list_is_built_on_request_and_counted(
    devkit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--format", "voc", "--root", str(devkit.parent), "--split", "train_aug", "--workers", "0"]
    with pytest.raises(UserError, match=r"train_aug\.txt comes with the SBD lists"):
        main(command)
    with pytest.raises(UserError, match=r"SegmentationClassAug: no such folder; unpack .* sbd --download"):
        main([*command, "--make-list"])
    masked(devkit, "SegmentationClassAug", *(f"{id}.png" for id in ("2007_000001", "2008_000003", "2007_000002")))
    listed(devkit, "val", "2007_000002\n")
    with pytest.raises(UserError, match=r"build it from SegmentationClassAug less val with: .* --make-list"):
        main(command)
    with pytest.raises(UserError, match=r"2 masks besides those of val\.txt, but train_aug has 10582 images"):
        main([*command, "--make-list"])
    assert voc.TRAIN_AUG == 10_582
    monkeypatch.setattr(voc, "TRAIN_AUG", 2)
    assert main([*command, "--make-list"]) == 0
    assert (devkit / "ImageSets/Segmentation/train_aug.txt").read_text() == "2007_000001\n2008_000003\n"
    assert "2 images, 3 labels" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already"):
        main([*command, "--make-list"])
    with pytest.raises(UserError, match="--make-list: makes the list train_aug"):
        main([*command[:4], "--split", "val", "--make-list"])


def test_labels_are_written_into_the_devkit_that_was_found(devkit: Path) -> None:
    assert main(["--format", "voc", "--root", str(devkit.parent.parent), "--split", "train", "--from", "xml"]) == 0
    assert (devkit / "labels.json").is_file()
