"""Pictures: palette values, overlays that keep the background, and the gallery from real networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_fast.config.schema import Config, EvalConfig, ModelConfig
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import LabelTable
from cosa_fast.evaluation.networks import Networks
from cosa_fast.network.build import build_model
from cosa_fast.pictures.gallery import MARGIN, TILE, gallery, sheet
from cosa_fast.pictures.overlay import heat_map, overlay
from cosa_fast.pictures.palette import colourise, palette, palette_image

CLASSES = ("cat", "dog")


def test_palette_is_that_of_pascal_voc() -> None:
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128)}
    known |= {20: (0, 64, 128), 255: (224, 224, 192)}
    colours = palette()
    assert {index: tuple(colours[index].tolist()) for index in known} == known
    assert len({tuple(colour) for colour in colours.tolist()}) == 256


def test_palette_image_keeps_indices_and_shows_colours(tmp_path: Path) -> None:
    classes = np.array([[0, 1, 20], [255, 2, 3]], dtype=np.uint8)
    palette_image(classes).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.array(image), classes)
        assert np.array_equal(np.array(image.convert("RGB")), palette()[classes])


def test_classes_beyond_a_byte_keep_their_indices_and_have_a_colour(tmp_path: Path) -> None:
    classes = np.array([[0, 1, 254, 255, 1203, -1]], dtype=np.int16)
    palette_image(np.abs(classes)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.array(image), np.abs(classes))
    shown = np.array(colourise(classes))[0]
    assert np.array_equal(shown[[0, 1, 2, 5]], palette()[[0, 1, 254, 255]])
    assert shown[3:5].any(axis=1).all(), "no class looks like background"


def test_overlay_leaves_the_background_as_it_is() -> None:
    image = Image.fromarray(np.full((2, 3, 3), 100, np.uint8))
    classes = np.array([[0, 1, 0], [2, 0, 0]], dtype=np.uint8)
    result = np.array(overlay(image, classes))
    assert (result[classes == 0] == 100).all()
    assert result[0, 1].tolist() == [114, 50, 50]
    assert np.array_equal(np.array(colourise(classes)), palette()[classes])


def test_heat_map_brightens_with_confidence() -> None:
    heat = np.array(heat_map(np.linspace(0, 1, 50)[None])).astype(int)
    assert heat[0, 0].tolist() == [0, 0, 0]
    assert heat[0, -1].tolist() == [255, 255, 220]
    brightness = heat[0] @ np.array([299, 587, 114])
    assert (np.diff(brightness) > 0).all()


def test_sheet_keeps_proportions() -> None:
    wide = Image.new("RGB", (100, 25), "red")
    canvas = np.array(sheet(["one", "two"], [[wide, wide]]))
    red = (canvas == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(red[:, : MARGIN + TILE])
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (TILE // 4, TILE)


@pytest.fixture(scope="module")
def networks() -> Networks:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ModelConfig(backbone="test_vit", weights="none", aux_layer=-2, decoder_width=16)
    student, teacher = (build_model(model, len(CLASSES)).train() for _ in range(2))
    config = Config(model=model, eval=EvalConfig(scales=(1.0,)))
    return Networks(config, CLASSES, 1, student, teacher, (None, None))


def image_files(root: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [root / f"{index}.png" for index in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return paths


def test_gallery_has_a_row_per_image_and_the_truth_last(networks: Networks, tmp_path: Path) -> None:
    images = image_files(tmp_path, 4)
    masks = [tmp_path / f"{index}_mask.png" for index in range(4)]
    for path in masks:
        Image.fromarray(np.ones((40, 60), np.uint8)).save(path)
    sheet_path = tmp_path / "new" / "gallery.png"
    gallery(networks, ImageDataset(CLASSES, list("abcd"), images, masks=masks), sheet_path, 2)
    with Image.open(sheet_path) as canvas:
        pixels = np.array(canvas)
    step = TILE + MARGIN
    assert pixels.shape == (20 + MARGIN + 2 * step, MARGIN + 5 * step, 3)
    truth = pixels[-step // 2 - 20 : -step // 2 + 20, -step // 2 - 20 : -step // 2 + 20].reshape(-1, 3)
    assert (truth[:, 0] >= 60).all(), "class 1 is dark red, mixed half and half"
    assert networks.on.training
    assert networks.an.training


def test_cams_of_the_gallery_are_gated_by_the_classes_of_the_mask(networks: Networks, tmp_path: Path) -> None:
    image, mask = image_files(tmp_path, 1)[0], tmp_path / "mask.png"
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(mask)
    gallery(networks, ImageDataset(CLASSES, ["a"], [image], masks=[mask]), tmp_path / "gallery.png", 1)
    with Image.open(tmp_path / "gallery.png") as canvas:
        tiles = np.array(canvas).astype(float)[20 + MARGIN :, MARGIN:]
    step = TILE + MARGIN
    original, cam = tiles[40:150, 10:180], tiles[40:150, step + 10 : step + 180]
    np.testing.assert_allclose(cam, 0.4 * original, atol=2, err_msg="no class present: no heat")


def test_gallery_without_masks_takes_the_labels(networks: Networks, tmp_path: Path) -> None:
    images = image_files(tmp_path, 1)
    labels = LabelTable(np.array([[True, False]]), np.array([True]))
    path = tmp_path / "gallery.png"
    gallery(networks, ImageDataset(CLASSES, ["a"], images, labels=labels), path, 8)
    with Image.open(path) as canvas:
        assert canvas.width == MARGIN + 4 * (TILE + MARGIN)
