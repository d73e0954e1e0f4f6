"""Which images an evaluation's figures are of: in words and for files."""

from pathlib import Path

import pytest
from evaluation_support import ColourNet, block_masks, evaluate, make_dataset

from cosa_fast.evaluation.evaluated import described, extent


@pytest.mark.parametrize(
    ("images", "of", "said"),
    [(50, 1449, "50 of 1449 images"), (50, 50, "50 images"), (1, None, "1 image"), (1, 2, "1 of 2 images")],
)
def test_the_extent_of_an_evaluation_is_said(images: int, of: int | None, said: str) -> None:
    assert extent(images, of) == said


def test_what_is_not_recorded_is_not_said() -> None:
    assert described({"images": 8, "of": 222, "split": "val"}) == "8 of 222 images of val"
    assert described({"images": 7, "split": "held out"}) == "7 images held out of the training"
    assert described({"split": "val"}) == "images of val"
    assert described({}) == "images"


def test_a_result_says_of_how_many_images_it_is(tmp_path: Path) -> None:
    result = evaluate(ColourNet(), make_dataset(tmp_path, block_masks()), limit=2)
    assert "evaluated: 2 of 3 images" in result.table().splitlines()
    found = result.evaluated_on("val")
    assert found == {"images": 2, "of": 3, "split": "val", "identity": found["identity"]}
    assert result.evaluated_on(None)["split"] == "held out"
