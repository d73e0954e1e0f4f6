"""COCO instances of any content, up to the drawn masks."""

import json
from pathlib import Path
from typing import Any

import pytest
from fuzz.oracle import NUMBERS, VALUES, fuzzed, held, put
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cosa_fast.data_pipeline.datasets.opening import open_dataset

pytest.importorskip("pycocotools")

SHAPES = st.one_of(
    st.lists(st.lists(NUMBERS | st.floats(-12, 24), max_size=9), max_size=3),
    st.lists(st.lists(st.floats(-12, 24), min_size=6, max_size=6), min_size=1, max_size=2),
    st.fixed_dictionaries({"size": st.just([10, 12]), "counts": st.lists(st.integers(-1, 120), max_size=6)}),
    st.fixed_dictionaries(
        {"size": st.just([10, 12]), "counts": st.text(st.characters(max_codepoint=127), max_size=12)}
    ),
    st.integers(0, 60).map(lambda first: {"size": [10, 12], "counts": [first, 60, 60 - first]}),
    VALUES,
)


@fuzzed(80)
@given(st.lists(SHAPES, min_size=1, max_size=3), st.booleans(), st.data())
def test_instances(tmp_path: Path, shapes: list[Any], whole: bool, data: st.DataObject) -> None:
    annotations = [
        {"id": number, "image_id": 3, "category_id": 5, "area": 36, "segmentation": shape}
        for number, shape in enumerate(shapes)
    ]
    content: Any = {
        "images": [{"id": 3, "file_name": "x.jpg", "height": 10, "width": 12}],
        "annotations": annotations,
        "categories": [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    if not whole:
        put(content, data.draw, data.draw(VALUES))
    for folder in ("annotations", "val"):
        (tmp_path / folder).mkdir(exist_ok=True)
    if not (tmp_path / "val" / "x.jpg").exists():
        Image.new("RGB", (12, 10)).save(tmp_path / "val" / "x.jpg")
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    dataset = held(tmp_path, lambda: open_dataset("coco", tmp_path, "val", need_labels=False), "instances_val", "val")
    if dataset is None:
        return

    def checked() -> bool:
        dataset.check_masks()
        return True

    sound = held(tmp_path, checked, "instances_val.json")
    for index in range(len(dataset)):
        mask = held(tmp_path, lambda index=index: dataset.mask(index), "instances_val.json", "x.jpg")
        if mask is not None:
            assert mask.max() <= len(dataset.classes)
        elif sound and dataset.has_masks:
            height, width = dataset._image_sizes[dataset._instances.image_ids[index]]
            assert (height, width) != (10, 12), "what the check lets pass can be drawn"
