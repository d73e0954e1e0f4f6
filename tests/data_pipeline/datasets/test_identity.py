"""A set is known again wherever it lies, and sets of the same names are told apart."""

from pathlib import Path

from evaluation_support import block_masks, make_dataset

from cosa_fast.data_pipeline.datasets.identity import contents, identity


def test_a_copy_and_a_link_are_the_same_images_and_others_of_the_same_names_are_not(tmp_path: Path) -> None:
    first = identity(make_dataset(tmp_path / "a", block_masks()))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert identity(make_dataset(tmp_path / "link", block_masks())) == first
    assert identity(make_dataset(tmp_path / "copy", block_masks())) == first
    assert identity(make_dataset(tmp_path / "other", block_masks()[::-1])) != first


def test_an_image_that_cannot_be_read_is_left_to_those_who_need_it(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, block_masks())
    dataset.image_path(1).unlink()
    assert len(list(contents(dataset, 16))) == 2
