"""All that a network says of an image is what evaluation and prediction make of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_support import COLOURS, MEAN, STD, ColourNet, block_masks
from PIL import Image

from cosa_fast.config.schema import Config, DataConfig, EvalConfig, TeacherConfig
from cosa_fast.evaluation.seeing import see

CONFIG = Config(
    data=DataConfig(mean=MEAN, std=STD), teacher=TeacherConfig(scales=(1.0,)), eval=EvalConfig(scales=(1.0,))
)


@pytest.fixture
def image() -> Image.Image:
    """A cat on background."""
    return Image.fromarray(COLOURS[block_masks()[0]])


def test_maps_are_of_the_images_size_and_of_its_classes(image: Image.Image) -> None:
    seen = see(ColourNet(), CONFIG, image, torch.tensor([0]))
    assert [cam.shape for cam in seen.cams] == [(1, 40, 57)] * 2
    confidence, category = seen.strongest()
    assert set(category.unique().tolist()) == {1}
    assert confidence[20, 25] > 0.9
    assert confidence[36, 3] < 0.1
    assert seen.segmentation.dtype == torch.uint8
    assert (seen.segmentation[12:26, 16:34] == 1).all()
    assert torch.equal(seen.ensemble(), (seen.cams[0] + seen.cams[1]) / 2)
    assert seen.logits is None


def test_without_labels_the_classifier_says_which_classes(image: Image.Image) -> None:
    seen = see(ColourNet(aux=False), CONFIG, image)
    assert seen.present.tolist() == (seen.scores > 0).nonzero()[:, 0].tolist()
    assert 0 in seen.present.tolist()
    assert len(seen.cams) == 1
    assert torch.equal(seen.ensemble(), seen.cams[0])


def test_logits_decide_the_segmentation_and_labels_limit_it(image: Image.Image) -> None:
    seen = see(ColourNet(), CONFIG, image, torch.tensor([0]), with_logits=True)
    assert seen.logits is not None
    assert np.array_equal(seen.logits.argmax(0), seen.segmentation)
    none = see(ColourNet(), CONFIG, image, torch.tensor([], dtype=torch.int64), label_aware=True)
    assert not none.segmentation.any()
    assert none.strongest()[1].sum() == 0


def test_scales_and_size_are_those_asked_for(image: Image.Image) -> None:
    network = ColourNet()
    seen = see(network, replace(CONFIG, eval=EvalConfig(scales=(1.0, 2.0))), image, size=(10, 20), scales=(0.5,))
    assert seen.segmentation.shape == (10, 20)
    assert [seg for _, seg in network.calls] == [False, True], "the decoder runs at its own scales only"
