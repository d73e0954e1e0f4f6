"""Augmentation parameters: pure in (seed, position), in range, distributed as METHOD section 2 says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosa_fast.data_pipeline.views.parameters import COLOUR_OPERATIONS, AugmentConfig, draw, image_index

CONFIG = AugmentConfig()


def test_a_position_is_drawn_independently_of_what_was_drawn_before() -> None:
    alone = draw(5, 1000, (375, 500), CONFIG)
    for position in range(10):
        draw(5, position, (375, 500), CONFIG)
    assert draw(5, 1000, (375, 500), CONFIG) == alone
    assert draw(5, 1001, (375, 500), CONFIG) != alone
    assert draw(6, 1000, (375, 500), CONFIG) != alone


def test_values_are_frozen_so_that_old_runs_resume_exactly() -> None:
    parameters = draw(0, 0, (375, 500), CONFIG)
    again = draw(0, 0, (375, 500), AugmentConfig(flip_probability=0.0, blur_radius=(0.0, 9.0)))
    assert (parameters.scaled_size, parameters.region, parameters.operation, parameters.magnitude) == (
        again.scaled_size,
        again.region,
        again.operation,
        again.magnitude,
    )
    uniform = np.random.Generator(np.random.Philox(key=np.array([0, 0], dtype=np.uint64))).random()
    assert parameters.scaled_size == (round(375 * (0.5 + 1.5 * uniform)), round(500 * (0.5 + 1.5 * uniform)))


@given(
    seed=st.integers(0, 2**63),
    position=st.integers(0, 2**63),
    height=st.integers(1, 9000),
    width=st.integers(1, 9000),
    crop=st.integers(16, 600),
)
def test_geometry_always_fits_image_and_crop(seed: int, position: int, height: int, width: int, crop: int) -> None:
    p = draw(seed, position, (height, width), AugmentConfig(crop_size=crop))
    for axis in (0, 1):
        start, length = p.region[axis], p.region[axis + 2]
        assert length == min(crop, p.scaled_size[axis]) == p.box[axis + 2]
        assert 0 <= start <= p.scaled_size[axis] - length
        assert 0 <= p.box[axis] <= crop - length
        assert (start == 0) or (p.box[axis] == 0)


def test_draws_follow_the_stated_distributions() -> None:
    drawn = [draw(1, position, (1000, 1000), CONFIG) for position in range(4000)]
    scales = np.array([p.scaled_size[0] / 1000 for p in drawn])
    assert scales.min() >= 0.5
    assert scales.max() <= 2.0
    assert np.abs(np.quantile(scales, [0.25, 0.5, 0.75]) - [0.875, 1.25, 1.625]).max() < 0.05
    assert abs(np.mean([p.flip for p in drawn]) - 0.5) < 0.04
    radii = np.array([p.blur_radius for p in drawn if p.blur_radius])
    assert abs(len(radii) / len(drawn) - 0.5) < 0.04
    assert 0.1 <= radii.min() <= radii.max() <= 2.0
    shares = [np.mean([p.operation == name for p in drawn]) for name in COLOUR_OPERATIONS]
    assert np.abs(np.array(shares) - 1 / 9).max() < 0.025
    assert {p.magnitude for p in drawn} == set(range(1, 10))
    starts = np.array([p.region.top / (p.scaled_size[0] - 448) for p in drawn if p.scaled_size[0] > 600])
    assert abs(starts.mean() - 0.5) < 0.03
    assert starts.max() > 0.98


def test_weak_only_configuration_draws_the_same_geometry_without_colours() -> None:
    strong, weak = (draw(1, 3, (300, 300), AugmentConfig(strong=strong)) for strong in (True, False))
    assert weak.operation == "identity"
    assert (strong.region, strong.box, strong.flip) == (weak.region, weak.box, weak.flip)


@pytest.mark.parametrize("length", [1, 2, 17, 100])
def test_every_image_comes_once_per_epoch_in_a_new_order(length: int) -> None:
    epochs = [[image_index(9, epoch * length + k, length) for k in range(length)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length >= 17:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != [image_index(10, k, length) for k in range(length)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_size": 15},
        {"scale_range": (2.0, 0.5)},
        {"scale_range": (0.5, 17.0)},
        {"flip_probability": 1.5},
        {"blur_probability": float("nan")},
        {"blur_radius": (-1.0, 2.0)},
        {"std": (0.2, 0.0, 0.2)},
    ],
)
def test_configuration_outside_its_range_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentConfig(**wrong)


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted both >= 0"):
        draw(0, -1, (3, 3), CONFIG)
    with pytest.raises(ValueError, match="length"):
        image_index(0, 0, 0)
