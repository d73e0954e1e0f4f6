"""threshold.scale: where the mixture of eq. 6 is fitted. ξ, its clamp and its start are confidences on either scale."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from cosa_fast.config.schema import ThresholdConfig
from cosa_fast.kernels import fit_mixture, histogram
from cosa_fast.method.threshold import DynamicThreshold

CPU = torch.device("cpu")
SCALES: list[Literal["linear", "sqrt"]] = ["linear", "sqrt"]


def two_peaks(low: float, high: float, spread: float, count: int = 200_000) -> Tensor:
    """(2, 1, count / 2) samples of two normal peaks of equal mass and width, kept inside [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    peaks = torch.tensor([[[low]], [[high]]])
    return (peaks + spread * torch.randn(2, 1, count // 2, generator=generator)).clamp(0, 1)


def learned(config: ThresholdConfig, confidence: Tensor) -> float:
    threshold = DynamicThreshold(config, CPU)
    threshold.update(confidence, torch.ones_like(confidence, dtype=torch.bool))
    return float(threshold.value)


def test_the_square_root_scale_finds_the_border_of_peaks_that_are_normal_there() -> None:
    """Peaks of one width at 0.4 and 0.8 on the scale of the roots meet at 0.6: ξ = 0.36."""
    roots = two_peaks(0.4, 0.8, 0.08)
    config = ThresholdConfig(scale="sqrt", clamp=(0.05, 0.95), floor=0.0)
    assert learned(config, roots.square()) == pytest.approx(0.36, abs=0.005)
    # The same confidences on the linear scale: the upper peak is the wider one there, and takes more.
    assert learned(ThresholdConfig(clamp=(0.05, 0.95), floor=0.0), roots.square()) < 0.355


def test_the_linear_scale_is_the_mixture_of_the_confidences_themselves() -> None:
    confidence = two_peaks(0.3, 0.7, 0.1)
    valid = torch.ones_like(confidence, dtype=torch.bool)
    wanted, _ = fit_mixture(histogram(confidence, valid), torch.tensor([0.55, 0, 0, 0, 0, 0]))
    assert learned(ThresholdConfig(), confidence) == float(wanted)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("clamp", "end"), [((0.7, 0.9), 0.7), ((0.1, 0.2), 0.2)])
def test_the_clamp_is_in_confidences(scale: Literal["linear", "sqrt"], clamp: tuple[float, float], end: float) -> None:
    assert learned(ThresholdConfig(scale=scale, clamp=clamp), two_peaks(0.3, 0.6, 0.05)) == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_the_floor_is_in_confidences(scale: Literal["linear", "sqrt"]) -> None:
    """What lies below the floor does not count: a spike at 0.04 leaves ξ where it was."""
    confidence = two_peaks(0.4, 0.8, 0.05)
    spiked = torch.cat([confidence, torch.full_like(confidence, 0.04)])
    config = ThresholdConfig(scale=scale, floor=0.05)
    assert learned(config, spiked) == learned(config, confidence)


def test_before_the_first_fit_xi_is_the_middle_of_the_clamp_on_its_scale() -> None:
    assert float(DynamicThreshold(ThresholdConfig(clamp=(0.2, 0.9)), CPU).value) == pytest.approx(0.55)
    middle = ((math.sqrt(0.2) + math.sqrt(0.9)) / 2) ** 2
    assert float(DynamicThreshold(ThresholdConfig(scale="sqrt", clamp=(0.2, 0.9)), CPU).value) == pytest.approx(middle)


@pytest.mark.parametrize("scale", SCALES)
def test_goes_on_from_its_state(scale: Literal["linear", "sqrt"]) -> None:
    config = ThresholdConfig(scale=scale)
    first, second = DynamicThreshold(config, CPU), DynamicThreshold(config, CPU)
    parts = two_peaks(0.3, 0.7, 0.1).chunk(4, -1)
    valid = torch.ones_like(parts[0], dtype=torch.bool)
    for part in parts[:2]:
        first.update(part, valid)
    second.load_state_dict(first.state_dict())
    for part in parts[2:]:
        first.update(part, valid)
        second.update(part, valid)
    assert torch.equal(first.value, second.value)
