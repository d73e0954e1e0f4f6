"""Segmentations of any images: which files are planned, and what the network sees of them."""

from pathlib import Path

import pytest
from evaluation_support import CLASSES, TINY_MODEL, picture, random_network
from PIL import Image

from cosa_fast.config.schema import Config, EvalConfig
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import Networks
from cosa_fast.evaluation.prediction import file_sources
from cosa_fast.pictures.predictions import Predictor


def test_large_image_is_shrunk_for_the_network_alone(tmp_path: Path) -> None:
    config = Config(model=TINY_MODEL, eval=EvalConfig(scales=(1.0,)))
    networks = Networks(config, CLASSES, 1, random_network(0), random_network(1), (None, None))
    sizes: list[tuple[int, ...]] = []
    networks.an.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    with Image.open(picture(tmp_path / "a.jpg", 900, 300)) as image:
        classes = Predictor(networks, max_side=96).predict(image).classes
    assert sizes == [(2, 3, 32, 96)]
    assert classes.shape == (300, 900)


def test_sources_that_hold_no_image_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no images in .*; they end in \.jpg"):
        file_sources([tmp_path])
    picture(tmp_path / "photos" / "sheep.jpg")
    with pytest.raises(UserError, match=r"phtos: no such file or folder \(did you mean '.*/photos'\?\); give"):
        file_sources([tmp_path / "phtos"])
    with pytest.raises(UserError, match=r"shep\.jpg: no such file or folder .did you mean '.*/sheep\.jpg'"):
        file_sources([tmp_path / "photos/shep.jpg"])
    with pytest.raises(UserError, match=r"no images in .*; those in folders below it .* for example .*/photos$"):
        file_sources([tmp_path])


def test_hidden_files_of_a_folder_are_no_images(tmp_path: Path) -> None:
    """As archives of macOS bring them."""
    picture(tmp_path / "a.jpg")
    (tmp_path / "._a.jpg").write_bytes(b"\0\5\x16\7")
    assert [source.name for source in file_sources([tmp_path])] == ["a"]
