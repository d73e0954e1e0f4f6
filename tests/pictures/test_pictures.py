"""Pictures: palette values, overlays that keep the background, and the gallery from real networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_fast.config.schema import Config, EvalConfig, ModelConfig
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import LabelTable
from cosa_fast.evaluation.networks import Networks
from cosa_fast.evaluation.seeing import see
from cosa_fast.network.build import build_model
from cosa_fast.pictures.gallery import MARGIN, TILE, Row, gallery, rows, sheet, spread
from cosa_fast.pictures.overlay import OPACITY, class_map, heat_map, overlay
from cosa_fast.pictures.palette import colourise, palette, palette_image, shown_palette

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
    image = Image.fromarray(np.full((40, 60, 3), 100, np.uint8))
    classes = np.zeros((40, 60), np.uint8)
    classes[10:30, 20:40] = 2
    result = np.array(overlay(image, classes)).astype(int)
    near = np.zeros((40, 60), bool)
    near[9:31, 19:41] = True
    assert (result[~near] == 100).all()
    assert result[20, 30].tolist() == [185, 185, 45], "yellow over grey"
    assert result[10, 30].tolist() == [255, 255, 0], "a bright line inside"
    assert result[9, 30].tolist() == [35, 35, 35], "a dark line outside"
    named = np.array(overlay(image, classes, ["cat", "dog"]))
    assert not np.array_equal(named, result)
    assert np.array_equal(np.array(colourise(classes)), palette()[classes])


# Machado, Oliveira, Fernandes 2009: what is left of linear RGB without one kind of cones.
EYES = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
GROUNDS = {
    "black fur": (25, 22, 20),
    "brown fur": (70, 45, 30),
    "light skin": (225, 172, 140),
    "dark skin": (110, 70, 50),
    "grass": (80, 110, 50),
    "sky": (150, 190, 225),
}


def seen(colours: np.ndarray, eyes: str) -> np.ndarray:
    """(..., 3) sRGB in Oklab, where about 0.02 can just be told apart."""
    values = np.asarray(colours) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(EYES[eyes]).T, 0, 1)
    cones = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    axes = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    return np.cbrt(linear @ np.array(cones).T) @ np.array(axes).T


@pytest.mark.parametrize("eyes", EYES)
def test_shown_colours_keep_apart_and_show_on_fur_and_skin(eyes: str) -> None:
    colours = shown_palette()[1:9].astype(float)
    distances = np.linalg.norm(seen(colours, eyes)[:, None] - seen(colours, eyes)[None], axis=-1)
    assert distances[~np.eye(8, dtype=bool)].min() > 0.08
    for name, ground in GROUNDS.items():
        laid = OPACITY * colours + (1 - OPACITY) * np.array(ground)
        assert np.linalg.norm(seen(laid, eyes) - seen(np.array(ground), eyes), axis=-1).min() > 0.05, name


def test_heat_map_brightens_with_confidence() -> None:
    heat = np.array(heat_map(np.linspace(0, 1, 50)[None])).astype(int)
    assert heat[0, 0].tolist() == [0, 0, 0]
    assert heat[0, -1].tolist() == [255, 255, 220]
    brightness = heat[0] @ np.array([299, 587, 114])
    assert (np.diff(brightness) > 0).all()


def test_class_map_is_grey_without_confidence_and_the_colour_at_one() -> None:
    image = Image.fromarray(np.full((1, 3, 3), (200, 100, 0), np.uint8))
    result = np.array(class_map(image, np.array([[0.0, 1.0, 0.5]]), np.array([[1, 2, 0]])))
    grey = np.array(image.convert("L"))[0, 0]
    assert result[0].tolist() == [[grey] * 3, [255, 255, 0], [grey] * 3]


def test_sheet_keeps_proportions_and_names_the_colours() -> None:
    wide = Image.new("RGB", (TILE, TILE // 4), "red")
    row = Row("a", ("cat",), {"one": wide, "two": wide}, frozenset({0, 2}))
    canvas = np.array(sheet([row], CLASSES))
    assert (canvas[-30:] == shown_palette()[2]).all(-1).sum() > 100, "the dog's colour in the legend"
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


PANELS = ["image", "CAM (AN)", "CAM† (AN)", "CPL (at 0.50)", "perplexity (dark: sure)", "Ω (not dark)"]


def test_rows_have_every_panel_of_each_image(networks: Networks, tmp_path: Path) -> None:
    images = image_files(tmp_path, 4)
    masks = [tmp_path / f"{index}_mask.png" for index in range(4)]
    for path in masks:
        Image.fromarray(np.ones((40, 60), np.uint8)).save(path)
    dataset = ImageDataset(CLASSES, list("abcd"), images, masks=masks)
    found = rows(networks, dataset, spread(len(dataset), 2))
    assert [row.id for row in found] == ["a", "c"]
    for row in found:
        assert list(row.panels) == [*PANELS, "segmentation (AN)", "truth"]
        assert {picture.size for picture in row.panels.values()} == {(TILE, round(TILE * 40 / 60))}
        assert row.present == ("cat",)
        truth = np.array(row.panels["truth"]).astype(float)[40:100, 40:180]
        image = np.array(row.panels["image"]).astype(float)[40:100, 40:180]
        np.testing.assert_allclose(truth, 0.45 * image + 0.55 * shown_palette()[1], atol=1)
    assert networks.on.training
    assert networks.an.training


def test_panels_show_what_the_network_sees(networks: Networks, tmp_path: Path) -> None:
    image = image_files(tmp_path, 1)
    mask = tmp_path / "mask.png"
    Image.fromarray(np.full((40, 60), 2, np.uint8)).save(mask)
    dataset = ImageDataset(CLASSES, ["a"], image, masks=[mask])
    known = replace(networks, thresholds=(0.3, 0.6))
    row = rows(known, dataset, [0])[0]
    assert "CPL (ξ = 0.30)" in row.panels
    at_grid = see(networks.an, networks.config, dataset.image(0), torch.tensor([1]), size=(149, TILE))
    confidence, category = at_grid.strongest()
    sure = np.array(row.panels["Ω (not dark)"]).sum() / np.array(row.panels["image"]).sum()
    assert 0.15 < sure <= 1
    assert ((confidence >= 0.3) & (category == 2)).any() == (2 in row.shown)


def test_a_band_has_neither_perplexity_nor_omega(networks: Networks, tmp_path: Path) -> None:
    config = replace(networks.config, threshold=replace(networks.config.threshold, mode="band"))
    labels = LabelTable(np.array([[True, False]]), np.array([True]))
    dataset = ImageDataset(CLASSES, ["a"], image_files(tmp_path, 1), labels=labels)
    row = rows(replace(networks, config=config), dataset, [0])[0]
    assert list(row.panels) == [*PANELS[:4], "segmentation (AN)"], "and no truth without masks"
    assert row.present == ("cat",)


def test_cams_are_gated_by_the_classes_of_the_mask(networks: Networks, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(mask)
    row = rows(networks, ImageDataset(CLASSES, ["a"], image_files(tmp_path, 1), masks=[mask]), [0])[0]
    grey = np.array(row.panels["image"].convert("L").convert("RGB"))
    assert np.array_equal(np.array(row.panels["CAM (AN)"]), grey), "no class present: no colour"
    assert row.present == ()


def test_the_gallery_is_a_sheet_of_rows(networks: Networks, tmp_path: Path) -> None:
    labels = LabelTable(np.array([[True, False]] * 2), np.array([True] * 2))
    dataset = ImageDataset(CLASSES, ["a", "b"], image_files(tmp_path, 2), labels=labels)
    path = tmp_path / "new" / "gallery.png"
    gallery(networks, dataset, path, 8)
    with Image.open(path) as canvas:
        assert canvas.width == MARGIN + 7 * (TILE + MARGIN)
        assert canvas.height > 2 * TILE
