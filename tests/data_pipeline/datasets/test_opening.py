"""Opening data sets: what is found where, and what is refused before training starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.shapes import rasterise
from cosa_fast.data_pipeline.datasets.voc import CLASSES
from cosa_fast.errors import UserError

TILE = Image.new("RGB", (6, 4), (90, 90, 90))
MakeVoc = Callable[..., Path]


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(*arguments, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_voc_classes_labels_and_masks(make_voc: MakeVoc) -> None:
    masks = {"a": np.array([[0, 8, 8, 255, 0, 0]] * 4, np.uint8)}
    dataset = open_dataset("voc", make_voc({"a": TILE, "b": TILE}, {"a": ["cat"], "b": []}, masks), "train")
    assert dataset.classes == CLASSES
    assert (dataset.ids, len(dataset), dataset.has_masks) == (("a", "b"), 2, True)
    assert dataset.labels(0).dtype == np.float32
    assert np.flatnonzero(dataset.labels(0)).tolist() == [7]
    assert not dataset.labels(1).any()
    assert np.array_equal(dataset.mask(0), masks["a"])
    with pytest.raises(UserError, match=r"b\.png: no such file"):
        dataset.mask(1)


def test_voc_lists_with_paths(make_voc: MakeVoc) -> None:
    dataset = open_dataset("voc", make_voc({"a": TILE}, {"a": ["cat"]}, suffix=".png"), "train")
    assert dataset.ids == ("a",)
    assert dataset.image(0).size == (6, 4)


def test_voc_prefers_augmented_masks(make_voc: MakeVoc) -> None:
    root = make_voc({"a": TILE}, {"a": []}, {"a": np.zeros((4, 6), np.uint8)})
    (root / "SegmentationClassAug").mkdir()
    Image.fromarray(np.full((4, 6), 3, np.uint8)).save(root / "SegmentationClassAug/a.png")
    assert (open_dataset("voc", root, "train").mask(0) == 3).all()


def test_voc_reads_annotations_when_there_is_no_label_file(make_voc: MakeVoc) -> None:
    root = make_voc({"a": TILE})
    (root / "Annotations").mkdir()
    part = "<object><name>person</name><part><name>hand</name></part></object><object><name>dog</name></object>"
    (root / "Annotations/a.xml").write_text(f"<annotation>{part}</annotation>")
    assert np.flatnonzero(open_dataset("voc", root, "train").labels(0)).tolist() == [11, 14]
    (root / "Annotations/a.xml").write_text("<annotation>")
    assert "a.xml" in refusal("voc", root, "train")


def test_missing_voc_says_what_to_download_and_what_to_try(tmp_path: Path) -> None:
    message = refusal("voc", tmp_path / "VOC2012", "train_aug")
    for part in (str(tmp_path / "VOC2012"), "VOCtrainval_11-May-2012.tar", "SegmentationClassAug.zip", "train_aug.txt"):
        assert part in message
    assert "data.root=" in message
    assert "python -m cosa_fast.train demo.yaml" in message


def test_voc_refusals_name_file_and_remedy(make_voc: MakeVoc) -> None:
    root = make_voc({"a": TILE, "b": TILE})
    assert "cosa_fast.prepare --format voc" in refusal("voc", root, "train")
    assert "did you mean 'train'" in refusal("voc", root, "trian")
    assert "no label for 1 of 2 images, first b" in refusal("voc", make_voc({"a": TILE, "b": TILE}, {"a": []}), "train")
    make_voc({"a": TILE, "b": TILE}, {"a": ["dgo"], "b": []})
    assert "unknown class 'dgo' (did you mean 'dog'?)" in refusal("voc", root, "train")
    (root / "JPEGImages/b.jpg").unlink()
    assert "1 of 2 listed images are missing" in refusal("voc", root, "train")
    (root / "ImageSets/Segmentation/train.txt").write_text("\n \n")
    assert "the list is empty" in refusal("voc", root, "train")
    assert "did you mean 'voc'" in refusal("vco", root, "train")
    assert str(root / "no.json") in refusal("voc", make_voc({"a": TILE}), "train", labels=root / "no.json")


def test_labels_may_be_absent_where_they_are_not_needed(make_voc: MakeVoc) -> None:
    dataset = open_dataset("voc", make_voc({"a": TILE}), "train", need_labels=False)
    with pytest.raises(UserError, match=r"a\.jpg: no image label"):
        dataset.labels(0)


def test_mask_and_rotated_image_must_agree(make_voc: MakeVoc) -> None:
    root = make_voc({"a": TILE}, {"a": []}, {"a": np.zeros((4, 6), np.uint8)})
    exif = Image.Exif()
    exif[0x0112] = 6
    TILE.save(root / "JPEGImages/a.jpg", exif=exif)
    dataset = open_dataset("voc", root, "train")
    assert dataset.image(0).size == (4, 6)
    with pytest.raises(UserError, match=r"a\.png: the mask is 6x4 but its image .*a\.jpg is 4x6 upright"):
        dataset.mask(0)


def test_fingerprint_follows_ids_and_labels(make_voc: MakeVoc) -> None:
    def fingerprint(*arguments: dict) -> str:
        return open_dataset("voc", make_voc(*arguments), "train").fingerprint()

    prints = [
        fingerprint({"a": TILE, "b": TILE}, {"a": ["cat"], "b": []}),
        fingerprint({"a": TILE, "b": TILE}, {"a": ["cat"], "b": ["cat"]}),
        fingerprint({"b": TILE, "a": TILE}, {"a": ["cat"], "b": ["cat"]}),
    ]
    assert len(set(prints)) == 3
    assert fingerprint({"b": TILE, "a": TILE}, {"a": ["cat"], "b": ["cat"]}) == prints[2]


def test_real_voc_labels_agree_with_masks(voc_animals: Path) -> None:
    dataset = open_dataset("voc", voc_animals, "val")
    assert len(dataset) == 222
    for index in range(0, 222, 37):
        present = set((np.flatnonzero(dataset.labels(index)) + 1).tolist())
        assert set(np.unique(dataset.mask(index)).tolist()) - {0, 255} <= present


def test_real_coco_is_opened_with_masks(tiny_coco: Path) -> None:
    pytest.importorskip("pycocotools")
    dataset = open_dataset("coco", tiny_coco, "train2017")
    assert len(dataset.classes) == 80
    assert dataset.classes[:2] == ("person", "bicycle")
    for index in range(0, len(dataset), 7):
        seen = set(np.unique(dataset.mask(index)).tolist()) - {0}
        present = set((np.flatnonzero(dataset.labels(index)) + 1).tolist())
        assert seen <= present
        assert len(seen) >= len(present) / 2, "small objects stay visible"


def test_coco_draws_large_areas_first() -> None:
    pytest.importorskip("pycocotools")
    small = {"segmentation": [[2, 2, 5, 2, 5, 5, 2, 5]], "area": 9, "category_id": 7}
    large = {"segmentation": {"size": [8, 8], "counts": [0, 64]}, "area": 64, "category_id": 3}
    for order in ([small, large], [large, small]):
        mask = rasterise(order, (8, 8), {3: 1, 7: 2})
        assert mask[3, 3] == 2
        assert (mask == 2).sum() < 20
        assert (mask == 0).sum() == 0


def test_coco_refusals(tiny_coco: Path, tmp_path: Path) -> None:
    assert "did you mean 'val2017'" in refusal("coco", tiny_coco, "val2071")
    assert "no such file" in refusal("coco", tmp_path, "train2017")
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations/instances_x.json"
    path.write_text("{}")
    assert "not a COCO instances file" in refusal("coco", tmp_path, "x")
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    assert "no image has an annotation" in refusal("coco", tmp_path, "x")
    assert "differ" in refusal("coco", tiny_coco, "val2017", classes=["cat"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    (root / "images").mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        TILE.save(root / "images" / name)
    (root / "labels.csv").write_text("a,wolf\nb.jpg,fox;wolf\n")
    return root


def test_folder_takes_images_labels_and_classes_from_the_files(folder: Path) -> None:
    dataset = open_dataset("folder", folder, "train")
    assert (dataset.ids, dataset.classes, dataset.has_masks) == (("a", "b"), ("fox", "wolf"), False)
    assert [dataset.labels(k).tolist() for k in (0, 1)] == [[0, 1], [1, 1]]
    (folder / "masks").mkdir()
    Image.fromarray(np.full((4, 6), 2, np.uint8)).save(folder / "masks/a.png")
    assert (open_dataset("folder", folder, "train").mask(0) == 2).all()
    (folder / "val.txt").write_text("b.jpg\n")
    assert open_dataset("folder", folder, "val").ids == ("b",)


@pytest.mark.parametrize("images", ["", "images/"])
@pytest.mark.parametrize("inside", ["", "set1/"])
@pytest.mark.parametrize("form", ["{split}/{name}.jpg", "images/{split}/{name}", "/old/place/{split}/{name}.JPG"])
def test_label_files_name_images_by_any_part_of_their_path(images: str, inside: str, form: str, tmp_path: Path) -> None:
    """Also where two splits have an image of the same name."""
    rows = []
    for split, names in (("train", ("same", "t")), ("val", ("same", "v"))):
        (tmp_path / images / split / inside).mkdir(parents=True)
        for name in names:
            TILE.save(tmp_path / images / split / inside / f"{name}.jpg")
            label = f"of {split}" if name == "same" else name
            rows.append(form.format(split=split, name=inside + name) + f",{label}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "classes.txt").write_text("of train\nof val\nt\nv\n")
    for split, expected in (("train", [0, 2]), ("val", [1, 3])):
        dataset = open_dataset("folder", tmp_path, split)
        assert dataset.ids == (f"{inside}same", f"{inside}{split[0]}")
        assert [int(dataset.labels(index).argmax()) for index in (0, 1)] == expected


def test_a_short_name_is_no_second_image(tmp_path: Path) -> None:
    """With folders inside those of splits, an image has several paths, and is one image."""
    for path in ("train/s1/a", "train/s2/b", "val/s1/c"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        TILE.save(tmp_path / f"{path}.jpg")
    (tmp_path / "labels.csv").write_text("a.jpg,cat\nb.jpg,dog\nc.jpg,cat\n")
    assert open_dataset("folder", tmp_path, "train").labels(1).tolist() == [0, 1]
    assert open_dataset("folder", tmp_path, "val").labels(0)[0] == 1
    TILE.save(tmp_path / "train/s2/a.jpg")
    assert "'a.jpg' may be s1/a or s2/a; write the folder too" in refusal("folder", tmp_path, "train")


def test_all_is_every_image_of_a_folder(folder: Path) -> None:
    """Beside lists, too; but not of folders that are splits, whose images would be taken for classes."""
    everything = open_dataset("folder", folder, "train").ids
    assert open_dataset("folder", folder, "all").ids == open_dataset("folder", folder, "val").ids == everything
    assert open_dataset("folder", folder, "val").notes == (f"all {len(everything)} images of {folder}",)
    (folder / "train.txt").write_text(f"{everything[0]}\n")
    assert len(open_dataset("folder", folder, "train")) == 1
    assert open_dataset("folder", folder, "all").ids == everything
    assert "no split 'val'; there are train, and all for all images; add" in refusal("folder", folder, "val")
    (folder / "images/test").mkdir()
    assert "no split 'all'" in refusal("folder", folder, "all")


def test_folder_refusals(folder: Path) -> None:
    (folder / "train.txt").write_text("a\nc\n")
    assert "1 of 2 listed images are missing" in refusal("folder", folder, "train")
    assert "did you mean 'train'" in refusal("folder", folder, "trian"), "a slip must not mean all images"
    (folder / "train.txt").write_text("")
    assert "no images" in refusal("folder", folder, "train")
    (folder / "train.txt").unlink()
    assert "no split 'trian' (did you mean 'train'?); there are train, val, and all for all images; add" in refusal(
        "folder", folder, "trian"
    ), "nor without lists"
    TILE.save(folder / "images/a.jpg")
    assert "same id" in refusal("folder", folder, "train")
    (folder / "images/a.jpg").unlink()
    (folder / "labels.csv").unlink()
    assert "no image labels" in refusal("folder", folder, "train")
    assert "no class names" in refusal("folder", folder, "train", need_labels=False)
    shutil.rmtree(folder)
    assert "no such folder" in refusal("folder", folder, "train")
