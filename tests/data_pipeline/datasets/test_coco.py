"""COCO's shapes: every damaged one is named before training, and none reaches the C library that trusts them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosa_fast.data_pipeline.datasets.coco import read_instances
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
    ([[1, 1, 5, 5]], "4 coordinates"),
    ([[]], "0 coordinates"),
    ([[1, float("nan"), 5, 1, 5, 5]], "not finite"),
    ([[1, float("inf"), 5, 1, 5, 5]], "not finite"),
    ([[0, 0, 11, 9] * 50000], "longer than"),
    ([], "no polygon"),
    ([5], "no list"),
    (None, "subscriptable"),
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
    "changes", [{"area": None}, {"area": float("nan")}, {"category_id": 5, "height": 10**9}, {"width": "12"}]
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
