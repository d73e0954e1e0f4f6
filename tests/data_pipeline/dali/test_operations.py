"""DALI's pixels are PIL's up to stated distances, for every operation at every strength and for the whole chain."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from cosa_fast.data_pipeline.datasets.images import lossless
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.views.parameters import COLOUR_OPERATIONS, AugmentConfig

pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra [dali])")


# (largest mean, largest difference away from the edges) in 8-bit steps; docs/data.md gives the causes.
EXACT = (0.0, 0)
CUT_OFF = (0.05, 1)
BOUNDS = {
    "decode": EXACT,
    "identity": EXACT,
    "resize": (0.25, 1),
    "resize, flipped": (0.25, 1),
    "blur": (0.6, 3),
    "autocontrast": CUT_OFF,
    "equalize": (0.5, 5),  # on small images; a photograph stays within 1
    "solarize": EXACT,
    "colour": CUT_OFF,
    "contrast": CUT_OFF,
    "brightness": CUT_OFF,
    "sharpness": (0.6, 1),
    "posterize": EXACT,
}
# nvJPEG and the GPU's own arithmetic may round otherwise.
GPU_SLACK = (0.7, 4)


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    return importlib.import_module("bench.views.parity")


def check(rows: list[dict[str, Any]], device: torch.device) -> None:
    slack = GPU_SLACK if device.type == "cuda" else (0, 0)
    for row in rows:
        mean, largest = BOUNDS[row["operation"]]
        assert row["mean"] <= mean + slack[0], row
        assert row["max_inside"] <= largest + slack[1], row


def test_every_operation_on_generated_images(parity: ModuleType, device: torch.device) -> None:
    rows = list(parity.rows(parity.generated(3), device))
    assert {row["operation"] for row in rows} == set(BOUNDS)
    assert {row["magnitude"] for row in rows if row["operation"] == "posterize"} == set(range(1, 10))
    check(rows, device)


def test_every_operation_on_real_images(parity: ModuleType, device: torch.device, voc_animals: Path) -> None:
    dataset = open_dataset("voc", voc_animals, "train_aug")
    check(list(parity.rows([dataset.encoded(index) for index in range(6)], device)), device)


def test_the_whole_chain_on_real_images(parity: ModuleType, device: torch.device, voc_animals: Path) -> None:
    dataset = open_dataset("voc", voc_animals, "train_aug")
    weak, strong = parity.chain(dataset, AugmentConfig(crop_size=224), 32, device)
    slack = GPU_SLACK[0] if device.type == "cuda" else 0
    assert weak["mean"] <= 0.4 + slack
    # A step of the weak view can cross a threshold of solarize or posterize, which makes it a large one.
    assert strong["mean"] <= 0.6 + slack


@pytest.mark.parametrize("operation", COLOUR_OPERATIONS)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (77, 180, 3)])
def test_images_of_one_colour(parity: ModuleType, operation: str, colour: tuple[int, int, int]) -> None:
    """No range to stretch, no histogram to level."""
    sizes = [(1, 1), (2, 3), (30, 20)]
    files = [lossless(Image.new("RGB", (width, height), colour)) for height, width in sizes]
    changes: dict[str, Any] = {"operation": operation, "magnitude": 8, "blur_radius": 1.3}
    weak, strong = parity.views(files, [parity.unchanged(size, **changes) for size in sizes], torch.device("cpu"))
    assert parity.distance(weak)["max"] == 0
    assert parity.distance(strong)["max"] <= 1


def test_the_comparison_sees_a_wrong_strength(parity: ModuleType) -> None:
    """The bounds are tight enough to tell neighbouring magnitudes apart."""
    files = parity.generated(2)
    images = [parity.read_image(Path("x"), file) for file in files]
    for operation in ("solarize", "colour", "contrast", "brightness", "sharpness"):
        drawn = [parity.unchanged((i.height, i.width), operation=operation, magnitude=3) for i in images]
        ours = [pair[0] for pair in parity.views(files, drawn, torch.device("cpu"))[1]]
        other = [parity.apply_colour_with_pil(image, operation, 4) for image in images]
        row = parity.distance(parity._pairs(ours, other), border=1)
        assert row["max_inside"] > 2 * max(1, BOUNDS[operation][1]), (operation, row)
