"""The fully connected CRF against a brute-force mean field, against pydensecrf, and what it is for."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cosa_fast.errors import UserError
from cosa_fast.evaluation.crf import crf_inference
from cosa_fast.kernels.launch.runtime import INTERPRETED

VOC = Path(os.environ.get("COSA_SHARED", Path(__file__).parents[3] / "shared")) / "data/voc_animals/JPEGImages"


def two_colours(height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A disc on a ground of another colour, both noisy: (image, labels, probabilities with a quarter of them wrong)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = ((y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 3) ** 2).long()
    colours = torch.tensor([[60, 120, 60], [170, 90, 40]])
    noise = torch.randint(-3, 4, (height, width, 3), generator=generator)
    image = (colours[labels] + noise).permute(2, 0, 1).to(torch.uint8)
    wrong = torch.rand(height, width, generator=generator) < 0.25
    seen = F.one_hot(torch.where(wrong, 1 - labels, labels), 2).permute(2, 0, 1)
    return image, labels, 0.3 + 0.4 * seen.float()


def random_case(classes: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    probabilities = torch.randn(classes, height, width, generator=generator, dtype=torch.float64).softmax(0)
    return probabilities, torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8) // 16


def mean_field_by_hand(
    probabilities: Tensor, image: Tensor, iterations: int, spatial: tuple[float, float], bilateral: tuple[float, ...]
) -> Tensor:
    """With (N, N) matrices, in float64."""
    classes, height, width = probabilities.shape
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    colours = image.flatten(1).T.double()
    apart, different = torch.cdist(places, places) ** 2, torch.cdist(colours, colours) ** 2
    kernels = [
        (spatial[1], torch.exp(-apart / (2 * spatial[0] ** 2))),
        (bilateral[2], torch.exp(-apart / (2 * bilateral[0] ** 2) - different / (2 * bilateral[1] ** 2))),
    ]
    kernels = [(weight, k / (k.sum(0)[:, None] * k.sum(1)[None]).sqrt()) for weight, k in kernels]
    unary = -probabilities.double().clamp(min=1e-5).log().flatten(1).T
    marginals = (-unary).softmax(1)
    for _ in range(iterations):
        marginals = (-unary + sum(weight * kernel @ marginals for weight, kernel in kernels)).softmax(1)
    return marginals.T.reshape(classes, height, width)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.skipif(
    not INTERPRETED, reason="kernels are compiled in this process, not interpreted"))])  # fmt: skip
def test_equals_the_mean_field_by_hand(backend: str) -> None:
    probabilities, image = random_case(3, 6, 7)
    found = crf_inference(
        probabilities.float(), image, iterations=4, spatial_sigma=3.0, spatial_weight=2.0, bilateral_sigma_xy=5.0,
        bilateral_sigma_rgb=4.0, bilateral_weight=5.0, backend=backend,
    )  # fmt: skip
    truth = mean_field_by_hand(probabilities, image, 4, (3.0, 2.0), (5.0, 4.0, 5.0))
    torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=0)
    assert (found.double() - probabilities).abs().max() > 0.1  # something was done


def test_float64_is_kept() -> None:
    probabilities, image = random_case(4, 5, 9)
    found = crf_inference(probabilities, image, iterations=3)
    truth = mean_field_by_hand(probabilities, image, 3, (1.0, 3.0), (67.0, 3.0, 4.0))
    torch.testing.assert_close(found, truth, atol=1e-9, rtol=0)


def test_marginals_sum_to_one() -> None:
    probabilities, image = random_case(5, 8, 6)
    found = crf_inference(probabilities.half(), image)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(0), torch.ones(8, 6))


@pytest.mark.parametrize("nothing", [{"iterations": 0}, {"spatial_weight": 0.0, "bilateral_weight": 0.0}])
def test_without_pairs_or_iterations_the_input_comes_back(nothing: dict[str, float]) -> None:
    probabilities, image = random_case(3, 5, 6)
    torch.testing.assert_close(crf_inference(probabilities, image, **nothing), probabilities)


def test_logits_are_probabilities_before_the_softmax() -> None:
    probabilities, image = random_case(3, 5, 6)
    torch.testing.assert_close(
        crf_inference(probabilities.log() + 7, image, logits=True), crf_inference(probabilities, image)
    )


def test_labels_follow_the_edges_of_the_image() -> None:
    image, labels, probabilities = two_colours(24, 30)
    wrong = (probabilities.argmax(0) != labels).float().mean()
    found = crf_inference(probabilities, image)
    assert wrong > 0.2
    assert torch.equal(found.argmax(0), labels)
    assert found.amax(0).mean() > 0.95


def test_noise_without_edges_is_smoothed_away() -> None:
    _, _, probabilities = two_colours(16, 16)
    found = crf_inference(probabilities, torch.zeros(3, 16, 16, dtype=torch.uint8))
    assert found.argmax(0).unique().numel() == 1


def test_lattice_without_pydensecrf_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    probabilities, image = random_case(2, 4, 4)
    with pytest.raises(UserError, match=r"pip install .*\[crf\]"):
        crf_inference(probabilities, image, method="lattice")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("probabilities", torch.rand(2, 4)),
        ("image", torch.rand(3, 4, 4)),
        ("iterations", -1),
        ("method", "fast"),
        ("spatial_sigma", 0.0),
        ("bilateral_weight", -1.0),
    ],
)
def test_bad_arguments_are_named(name: str, value: object) -> None:
    probabilities, image = random_case(2, 4, 4)
    with pytest.raises(ValueError, match=rf"^{name}: got .+, want .+"):
        crf_inference(**{"probabilities": probabilities, "image": image, name: value})  # type: ignore[arg-type]


def both(probabilities: Tensor, image: Tensor, **options: float) -> tuple[Tensor, Tensor, float]:
    """Marginals by the exact sums and by pydensecrf, and the share of the pixels with the same label."""
    exact, lattice = (
        crf_inference(probabilities, image, method=method, **options)  # type: ignore[arg-type]
        for method in ("exact", "lattice")
    )
    torch.testing.assert_close(lattice.sum(0), torch.ones_like(lattice[0]))
    return exact, lattice, float((exact.argmax(0) == lattice.argmax(0)).float().mean())


# Bounds: measured differences, with head room. The lattice is the approximation.
@pytest.mark.parametrize(
    "options",
    [
        {"spatial_sigma": 3.0, "bilateral_weight": 0.0},
        {"spatial_sigma": 1.0, "bilateral_weight": 0.0},
        {"spatial_weight": 0.0},
    ],
)
def test_one_iteration_of_each_term_is_pydensecrfs(options: dict[str, float]) -> None:
    pytest.importorskip("pydensecrf")
    image, _, probabilities = two_colours(40, 50)
    exact, lattice, agreed = both(probabilities, image, iterations=1, **options)
    assert (exact - probabilities).abs().mean() > 0.02
    assert (exact - lattice).abs().mean() < 0.006  # measured 0.002 to 0.004
    assert agreed > 0.98  # measured 0.9885


def test_labels_agree_with_pydensecrf_on_a_generated_image() -> None:
    pytest.importorskip("pydensecrf")
    image, labels, probabilities = two_colours(40, 50)
    exact, lattice, agreed = both(probabilities, image)
    assert agreed > 0.995  # measured 1
    assert (exact - lattice).abs().mean() < 0.001  # measured 0.0001
    assert (exact.argmax(0) == labels).float().mean() > 0.995


@pytest.mark.skipif(not VOC.is_dir(), reason="no VOC images")
def test_labels_agree_with_pydensecrf_on_real_images() -> None:
    pytest.importorskip("pydensecrf")
    for path in sorted(VOC.glob("*.jpg"))[:2]:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB").resize((64, 48), Image.Resampling.BOX))
        image = torch.tensor(pixels).permute(2, 0, 1)
        # Three classes told apart by coarse, noisy evidence.
        generator = torch.Generator().manual_seed(0)
        coarse = F.interpolate(
            torch.randn(1, 3, 6, 8, generator=generator) * 2, size=(48, 64), mode="bilinear", align_corners=False
        )
        probabilities = (coarse[0] + 0.5 * torch.randn(3, 48, 64, generator=generator)).softmax(0)
        exact, _, agreed = both(probabilities, image)
        assert agreed > 0.97  # measured on four images: 0.979 to 0.992
        assert (exact.argmax(0) != probabilities.argmax(0)).float().mean() > 0.03  # more than the methods differ by
