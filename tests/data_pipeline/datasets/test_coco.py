"""COCO's shapes: every damaged one is named before training, and none reaches the C library that trusts them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.instances import read_instances
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.errors import UserError

SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write an instances file of one 10x12 image (height x width) with one annotation; returns ROOT."""

    def write_it(segmentation: Any, **changes: Any) -> Path:
        annotation = {"id": 7, "image_id": 3, "category_id": 5, "area": 36, "segmentation": segmentation}
        image = {"id": 3, "file_name": "x.jpg", "height": 10, "width": 12}
        category = {"id": 5, "name": "cat"}
        for key, value in changes.items():
            next(part for part in (annotation, image, category) if key in part)[key] = value
        for folder in ("annotations", "val"):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "val" / "x.jpg").touch()
        content = {"images": [image], "annotations": [annotation], "categories": [category]}
        (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
        return tmp_path

    return write_it


DAMAGED = [
    ([[1, None, 5, 1, 5, 5]], "no list of numbers"),
    ([[1, "2", 5, 1, 5, 5]], "no list of numbers"),
    ([[1, True, 5, 1, 5, 5]], "no list of numbers"),
    ([[1e9, 1, 5, 1, 5, 5]], "far outside"),
    ([[1, -1e9, 5, 1, 5, 5]], "far outside"),
    ([[1, 10**400, 5.5, 1, 5, 5]], "too large"),
    ([[1, 1, 5, 1, 5]], "5 coordinates"),
    ([[1, 1, 5, 5], [1, 1, 5, 1, 5]], "5 coordinates"),
    ([[1, float("nan"), 5, 1, 5, 5]], "not finite"),
    ([[1, float("inf"), 5, 1, 5, 5]], "not finite"),
    ([[0, 0, 11, 9] * 50000], "longer than"),
    ([5], "1 coordinates"),
    (["x"], "no list"),
    ("text", "indices"),
    ({"size": [10, 12], "counts": [0, 100]}, "do not make up"),
    ({"size": [10, 12], "counts": [-20, 140]}, "do not make up"),
    ({"size": [12, 10], "counts": [0, 120]}, "do not make up"),
    ({"size": [10, 12], "counts": [0, 2**70]}, "do not make up"),
    ({"size": [10, 12], "counts": "\x7f\x7f"}, "damaged"),
    ({"size": [10, 12], "counts": "o" * 40}, "damaged"),
    ({"size": [10, 12], "counts": "o"}, "end too early"),
    ({"size": [10, 12], "counts": 5}, "no list"),
]


@pytest.mark.parametrize(("segmentation", "problem"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_shape_is_named_before_training_and_never_drawn(write: Any, segmentation: Any, problem: str) -> None:
    dataset = open_dataset("coco", write(segmentation), "val", need_labels=False)
    with pytest.raises(UserError, match=rf"instances_val\.json: annotation 7 of image 3: .*{problem}"):
        dataset.check_masks()
    with pytest.raises(UserError, match=r"instances_val\.json, image 3: unreadable segmentation"):
        dataset.mask(0, (10, 12))


@pytest.mark.parametrize(
    "changes", [{"area": "36"}, {"area": float("nan")}, {"category_id": 5, "height": 10**9}, {"width": "12"}]
)
def test_damaged_numbers_beside_the_shape_are_named(write: Any, changes: dict[str, Any]) -> None:
    dataset = open_dataset("coco", write(SQUARE, **changes), "val", need_labels=False)
    with pytest.raises(UserError, match="annotation 7 of image 3"):
        dataset.check_masks()


@pytest.mark.parametrize("key", ["name", "file_name"])
@pytest.mark.parametrize("value", [None, 5, "", " ", ["x"], "a\0b"])
def test_what_is_no_name_is_refused(write: Any, key: str, value: Any) -> None:
    write(SQUARE)
    with pytest.raises(UserError, match=r"instances_val\.json: not a COCO instances file .*is no name"):
        read_instances(write(SQUARE, **{key: value}) / "annotations" / "instances_val.json")


def test_polygons_and_both_run_length_forms_draw_the_same(write: Any) -> None:
    pytest.importorskip("pycocotools")
    from pycocotools import mask as codec

    drawn = open_dataset("coco", write(SQUARE), "val").mask(0, (10, 12))
    assert (drawn == 1).sum() == 36
    compressed = codec.encode(np.asfortranarray(drawn))["counts"].decode()
    changes = np.flatnonzero(np.diff(np.concatenate([[0], drawn.T.ravel(), [2]])))
    plain = np.diff(np.concatenate([[0], changes])).tolist()
    for counts in (compressed, plain):
        again = open_dataset("coco", write({"size": [10, 12], "counts": counts}), "val").mask(0, (10, 12))
        assert np.array_equal(again, drawn)


def test_every_compressed_mask_is_read_as_the_library_reads_it(write: Any) -> None:
    pytest.importorskip("pycocotools")
    from pycocotools import mask as codec

    random = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 0.98, 1.0):
        drawn = (random.random((90, 70)) < share).astype(np.uint8)
        counts = codec.encode(np.asfortranarray(drawn))["counts"].decode()
        root = write({"size": [90, 70], "counts": counts}, height=90, width=70)
        assert np.array_equal(open_dataset("coco", root, "val").mask(0, (90, 70)), drawn)


def test_shapes_of_images_that_are_not_in_the_file_do_not_matter(write: Any) -> None:
    root = write(SQUARE)
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"].append({**content["annotations"][0], "image_id": 99, "segmentation": None})
    path.write_text(json.dumps(content))
    open_dataset("coco", root, "val").check_masks()


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Write a COCO folder: make(files, annotations, place="val", names=..., split="val") -> ROOT; every file is an
    image of 12x10 below `place`. annotations: (position of the file, segmentation or the annotation's own keys).
    """

    def make_it(
        files: list[str],
        annotations: list[tuple[int, Any]],
        *,
        place: str = "val",
        split: str = "val",
        listing: str | None = None,
        images: list[dict[str, Any]] | None = None,
        categories: int = 1,
    ) -> Path:
        names = [name.replace("\\", "/") for name in files]
        for name in names:
            path = tmp_path / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10)).save(path)
        described = images or [{"file_name": name} for name in files]
        content = {
            "images": [{"id": k, "height": 10, "width": 12, **image} for k, image in enumerate(described)],
            "annotations": [
                {"id": number, "image_id": image, "category_id": 1, **(keys if isinstance(keys, dict) else shape(keys))}
                for number, (image, keys) in enumerate(annotations)
            ],
            "categories": [{"id": k, "name": f"class {k}"} for k in range(1, categories + 1)],
        }
        path = tmp_path / (listing or f"annotations/instances_{split}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return tmp_path

    return make_it


def shape(segmentation: Any) -> dict[str, Any]:
    return {"segmentation": segmentation, "area": 36}


def opened(root: Path, split: str = "val") -> tuple[ImageDataset, list[str]]:
    said: list[str] = []
    return open_dataset("coco", root, split, say=said.append), said


@pytest.mark.parametrize("nothing", [[], [[]], None, {}, [[1, 1]], [[1, 1, 5, 5]], {"absent": True}])
def test_an_annotation_without_a_shape_is_counted_and_not_drawn(make: Any, nothing: Any) -> None:
    pytest.importorskip("pycocotools")
    keys = {"area": 4} if nothing == {"absent": True} else shape(nothing)
    dataset, _ = opened(make(["x.jpg"], [(0, SQUARE), (0, keys)]))
    notes = dataset.check_masks()
    assert len(notes) == 1
    assert notes[0].startswith("1 annotation without a shape, or with a polygon of fewer than three points")
    assert notes[0].endswith("the first is annotation 1 of image 0")
    assert (dataset.mask(0) == 1).sum() == 36


def test_a_polygon_of_two_points_beside_another_is_left_out(make: Any) -> None:
    pytest.importorskip("pycocotools")
    dataset, _ = opened(make(["x.jpg"], [(0, [*SQUARE, [0, 0, 9, 9]])]))
    assert len(dataset.check_masks()) == 1
    assert (dataset.mask(0) == 1).sum() == 36


def test_a_flat_list_of_coordinates_is_one_polygon(make: Any) -> None:
    pytest.importorskip("pycocotools")
    dataset, _ = opened(make(["x.jpg"], [(0, SQUARE[0])]))
    assert dataset.check_masks() == []
    assert (dataset.mask(0) == 1).sum() == 36


@pytest.mark.parametrize("area", [{}, {"area": None}])
def test_a_missing_area_is_computed(make: Any, area: dict[str, Any]) -> None:
    """It decides what lies on top: the smaller of two, whatever their order and form."""
    pytest.importorskip("pycocotools")
    large = {"segmentation": {"size": [10, 12], "counts": [0, 120]}, "category_id": 2, **area}
    small = {"segmentation": SQUARE, "category_id": 1, **area}
    for order in ([large, small], [small, large]):
        dataset, _ = opened(make(["x.jpg"], [(0, keys) for keys in order], categories=2))
        assert dataset.check_masks() == []
        assert ((dataset.mask(0) == 1).sum(), (dataset.mask(0) == 2).sum()) == (36, 84)


def test_boxes_alone_train_without_masks(make: Any) -> None:
    dataset, said = opened(make(["x.jpg", "y.jpg"], [(0, {"bbox": [1, 1, 5, 5]}), (1, {"bbox": [0, 0, 2, 2]})]))
    assert not dataset.has_masks
    assert any("no annotation of instances_val.json has a shape, so there are no masks" in text for text in said)
    assert dataset.labels(1).tolist() == [1]
    assert dataset.check_masks() == []


def test_images_without_annotations_and_annotations_without_images_are_counted(make: Any) -> None:
    dataset, said = opened(make(["x.jpg", "y.jpg", "z.jpg"], [(1, SQUARE), (7, SQUARE)]))
    assert dataset.ids == ("y",)
    assert any("2 of 3 images have no annotation and are left out" in text for text in said)
    assert any("the annotations of 1 image that instances_val.json does not list" in text for text in said)


def test_a_file_without_annotations_is_refused(make: Any) -> None:
    path = make(["x.jpg"], []) / "annotations/instances_val.json"
    with pytest.raises(UserError, match="no image has an annotation"):
        opened(path.parents[1])
    content = json.loads(path.read_text())
    del content["annotations"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"instances_val\.json: holds no annotations, it only lists images"):
        opened(path.parents[1])
    content["annotations"] = [{"id": 5, "image_id": 0, "category_id": 99}]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="annotation 5 is of category 99, which it does not have"):
        opened(path.parents[1])


@pytest.mark.parametrize(("there", "asked"), [("2017", "2014"), ("2014", "2017")])
def test_the_other_year_is_found_and_said(make: Any, there: str, asked: str) -> None:
    root = make(["x.jpg"], [(0, SQUARE)], place=f"val{there}", split=f"val{there}")
    dataset, said = opened(root, f"val{asked}")
    assert dataset.image(0).size == (12, 10)
    assert any(f"{root} has no val{asked}, val{there} is taken" in text for text in said)
    make(["x.jpg"], [(0, SQUARE)], place=f"train{asked}", split=f"train{asked}")
    with pytest.raises(UserError, match=f"instances_val{asked}.json: no such file"):
        opened(root, f"val{asked}")  # the years share images, so they are not mixed


@pytest.mark.parametrize(
    ("place", "listing"),
    [
        ("val2017", "annotations/instances_val2017.json"),
        ("images/val2017", "annotations/instances_val2017.json"),
        ("JPEGImages/val2017", "annotations/instances_val2017.json"),
        ("val2017/val2017", "annotations_trainval2017/annotations/instances_val2017.json"),
        ("images", "instances_val2017.json"),
        ("val2017", "annotations/val2017.json"),
        ("val2017", "val2017/_annotations.coco.json"),
    ],
)
def test_every_place_of_images_and_annotations(make: Any, place: str, listing: str) -> None:
    root = make(["x.jpg"], [(0, SQUARE)], place=place, listing=listing)
    assert opened(root, "val2017")[0].image(0).size == (12, 10)


def test_ids_are_whole_relative_names(make: Any) -> None:
    """One basename in two folders is two images; backslashes are slashes."""
    files = ["one/x.jpg", "two\\x.jpg", "./three/y.png"]
    root = make(files, [(0, SQUARE), (1, SQUARE), (2, SQUARE)])
    dataset, _ = opened(root)
    assert dataset.ids == ("one/x", "two/x", "three/y")
    assert all(dataset.image(k).size == (12, 10) for k in range(3))
    (root / "labels.csv").write_text("one/x.jpg,class 1\ntwo/x.jpg,none\ny,class 1\n")
    given = open_dataset("coco", root, "val", labels=root / "labels.csv")
    assert [given.labels(k).tolist() for k in range(3)] == [[1], [0], [1]]


def test_file_names_may_start_with_the_split(make: Any) -> None:
    root = make(["val2014/x.jpg"], [(0, SQUARE)], place=".", split="val2014")
    dataset, _ = opened(root, "val2014")
    assert (dataset.ids, dataset.image(0).size) == (("val2014/x",), (12, 10))


@pytest.mark.parametrize("above", ["/data/coco/val2014/", "C:\\coco\\val2014\\", "/data/coco/"])
def test_folders_of_another_machine_are_left_out(make: Any, above: str) -> None:
    images = [{"file_name": f"{above}{name}.jpg"} for name in "xy"]
    root = make(["x.jpg", "y.jpg"], [(0, SQUARE), (1, SQUARE)], place="val2014", split="val2014", images=images)
    dataset, _ = opened(root, "val2014")
    assert [dataset.image_path(k) for k in range(2)] == [root / "val2014" / f"{name}.jpg" for name in "xy"]


def test_coco_url_names_the_file_where_there_is_no_file_name(make: Any) -> None:
    images = [{"coco_url": "http://images.example.org/train2017/x.jpg"}]
    root = make(["train2017/x.jpg"], [(0, SQUARE)], place=".", listing="lvis_v1_val.json", images=images)
    assert opened(root, "lvis_v1_val")[0].image(0).size == (12, 10)


def test_two_images_of_one_name_are_refused(make: Any) -> None:
    with pytest.raises(UserError, match="two of its images have the name x; rename one"):
        opened(make(["x.jpg", "x.png"], [(0, SQUARE), (1, SQUARE)]))


@pytest.mark.parametrize("name", ["COCO_val2014_000000000042.png", "000000000042.png", "000000000042.tif"])
@pytest.mark.parametrize("folder", ["SegmentationClass/val2014", "SegmentationClass"])
def test_png_masks_go_before_shapes(make: Any, folder: str, name: str) -> None:
    files = ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000043.jpg"]
    root = make(files, [(0, SQUARE), (1, SQUARE)], place="val2014", split="val2014")
    (root / folder).mkdir(parents=True)
    Image.fromarray(np.full((10, 12), 1, np.uint8)).save(root / folder / name)
    dataset, said = opened(root, "val2014")
    assert (dataset.mask(0) == 1).all()
    assert not any("drawn" in text for text in said)
    assert [dataset.has_mask(k) for k in range(2)] == [True, False]
    Image.fromarray(np.full((10, 12), 90, np.uint8)).save(root / folder / name)
    with pytest.raises(UserError, match=r"value 90 is neither a class \(0\.\.1\)"):
        dataset.check_masks([0])


def test_masks_of_other_names_are_pointed_at(make: Any) -> None:
    root = make(["x.jpg"], [(0, SQUARE)])
    (root / "SegmentationClass/val").mkdir(parents=True)
    Image.fromarray(np.full((10, 12), 1, np.uint8)).save(root / "SegmentationClass/val/other.png")
    _, said = opened(root)
    assert any("masks are drawn from instances_val.json, for " in text for text in said)
