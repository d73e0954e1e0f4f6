"""contrastive_separation: both back-ends against the formula in float64, and what the kernels alone promise."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import assert_fullgraph, assert_no_copies, assert_three_way, layouts
from torch import Tensor

from cosa_fast.kernels import contrastive_rows, contrastive_separation, reference
from cosa_fast.kernels.contrastive_rows import CHANNELS, select_rows
from cosa_fast.kernels.contrastive_separation import _backward, _forward, _limit, _run_backward, _run_forward
from cosa_fast.kernels.launch import runtime

THRESHOLD = 0.4
VECTORS, SCOPES, SIMILARITIES = ["logits", "probability"], ["image", "batch"], ["cosine", "dot"]
Case = dict[str, Any]


@dataclass(frozen=True)
class Provider:
    """A back-end and where it runs."""

    backend: str
    device: torch.device

    def __call__(self, cam: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        """(loss, gradient of the CAM)."""
        rest = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in rest.items()}
        cam = cam.detach().to(self.device).requires_grad_()
        loss = contrastive_separation(cam, backend=self.backend, **rest)
        return loss.detach(), torch.autograd.grad(loss, cam)[0]


REFERENCE = Provider("reference", torch.device("cpu"))


@pytest.fixture(params=["reference", "cpu", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def provider(request: pytest.FixtureRequest) -> Provider:
    """The definition, what is written for a CPU, and the kernels interpreted and on CUDA."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "triton" and not runtime.INTERPRETED:
        pytest.skip("kernels are compiled in this process, not interpreted")
    if request.param == "reference":
        return REFERENCE
    if request.param == "cpu":
        return Provider(request.getfixturevalue("on_cpu"), torch.device("cpu"))
    return Provider("triton", torch.device("cuda" if request.param == "cuda" else "cpu"))


@pytest.fixture
def kernels(kernel_device: torch.device) -> Provider:
    """The kernels alone."""
    return Provider("triton", kernel_device)


def case(batch: int, classes: int, grid: tuple[int, int], seed: int = 0, labels: int = 3) -> Case:
    """Inputs with at most `labels` different categories, ignored and invalid pixels, and every image with a class."""
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randn(batch, classes, *grid, generator=generator)
    category = torch.randint(0, min(labels, classes) + 1, (batch, *grid), generator=generator)
    category[torch.rand(batch, *grid, generator=generator) < 0.1] = classes + 1
    image_labels = torch.rand(batch, classes, generator=generator) < 0.5
    image_labels[:, 0] |= ~image_labels.any(1)
    return {
        "cam": cam,
        "image_labels": image_labels,
        "category": category.short(),
        "confidence": torch.rand(batch, *grid, generator=generator),
        "valid": torch.rand(batch, *grid, generator=generator) < 0.8,
        "threshold": THRESHOLD,
    }


def changed(values: Case, **changes: Any) -> Case:
    return {**values, **changes}


def as_type(values: Case, dtype: torch.dtype) -> Case:
    return changed(values, cam=values["cam"].to(dtype), confidence=values["confidence"].to(dtype))


def formula(
    cam: Tensor, image_labels: Tensor, category: Tensor, confidence: Tensor, valid: Tensor, threshold: float,
    vectors: str, scope: str, similarity: str, epsilon: float, temperature: float = 0.5,
) -> Tensor:  # fmt: skip
    """Eqs. 9, 10 pixel by pixel, differentiable."""
    y = image_labels[:, :, None, None]
    q = torch.cat((1 - (y * cam.sigmoid()).amax(1, keepdim=True), y * cam.sigmoid()), 1)
    x = (q if vectors == "probability" else cam).movedim(1, -1)
    x = x / x.norm(dim=-1, keepdim=True) if similarity == "cosine" else x
    d = torch.where(confidence >= threshold, (confidence - threshold) / (1 - threshold), 1 - confidence / threshold)
    chosen = valid & (category <= cam.shape[1]) & (-(0.8 * d.clamp(min=1e-4)).log() <= epsilon)
    label = category.where(confidence >= threshold, 0)[chosen]
    x, image = x[chosen], chosen.nonzero()[:, 0]
    total = cam.new_zeros(())
    for i in range(len(x)):
        near = (image == image[i]) | (scope == "batch")
        near[i] = False
        positive, negative = (x[near & same] @ x[i] / temperature for same in (label == label[i], label != label[i]))
        if len(positive) and len(negative):
            total = total + (torch.exp(negative.logsumexp(0) - positive) + 1).log().mean()
    return total / max(len(x), 1)


def assert_as_exact(kernels: Provider, tolerance: float, values: Case, **parameters: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient are as near to float64 as those of plain PyTorch in the same type."""
    found, plain = (run(**values, **parameters) for run in (kernels, REFERENCE))
    truth = REFERENCE(**as_type(values, torch.float64), **parameters)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == values["cam"].dtype
    assert_three_way(found[0], plain[0], truth[0], tolerance, "loss")
    if truth[1].abs().max() < 1e-12:  # as cosines of logits of one class, all ±1: what is left is rounding
        assert (found[1].cpu() * values["cam"]).abs().max() < 1e-6
    else:
        assert_three_way(found[1], plain[1], truth[1], tolerance, "gradient")
    return found


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# The formula.


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    parameters=st.fixed_dictionaries(
        {
            "vectors": st.sampled_from(VECTORS),
            "scope": st.sampled_from(SCOPES),
            "similarity": st.sampled_from(SIMILARITIES),
            "epsilon": st.sampled_from([1.0, 2.0]),
        }
    ),
    seed=st.integers(0, 1000),
)
def test_the_definition_is_the_formula(
    batch: int, classes: int, grid: tuple[int, int], parameters: dict[str, Any], seed: int
) -> None:
    values = as_type(case(batch, classes, grid, seed), torch.float64)
    cam = values["cam"].clone().requires_grad_()
    expected = formula(**changed(values, cam=cam), **parameters)
    loss, gradient = REFERENCE(**values, **parameters)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-12)
    if expected.requires_grad:
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, cam)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("written_for", ["reading", "a CPU"])
def test_gradcheck(vectors: str, scope: str, similarity: str, written_for: str, on_cpu: str) -> None:
    backend = on_cpu if written_for == "a CPU" else "reference"
    values = as_type(case(2, 3, (3, 3)), torch.float64)

    def loss(cam: Tensor) -> Tensor:
        return contrastive_separation(
            **changed(values, cam=cam), vectors=vectors, epsilon=1.5, scope=scope, similarity=similarity,
            backend=backend,
        )  # fmt: skip

    assert loss(values["cam"]).item() > 0
    torch.autograd.gradcheck(loss, values["cam"].requires_grad_())


# Classes that fill tiles of 16 and 32 channels with and without one for the background; VOC and COCO likewise.
SHAPES = [
    (2, 1, (3, 3), "image", "cosine"), (2, 1, (3, 3), "batch", "dot"), (1, 2, (1, 1), "image", "cosine"),
    (3, 2, (5, 7), "image", "cosine"), (3, 2, (5, 7), "image", "dot"), (3, 2, (5, 7), "batch", "cosine"),
    (3, 2, (5, 7), "batch", "dot"), (1, 15, (5, 5), "image", "cosine"), (1, 16, (5, 5), "batch", "dot"),
    (2, 20, (6, 7), "image", "cosine"), (2, 20, (5, 6), "batch", "dot"), (2, 21, (4, 5), "batch", "cosine"),
    (1, 31, (5, 5), "image", "dot"), (1, 32, (5, 5), "image", "cosine"), (1, 80, (6, 6), "image", "cosine"),
    (2, 81, (4, 5), "batch", "dot"),
]  # fmt: skip


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize(("batch", "classes", "grid", "scope", "similarity"), SHAPES)
def test_kernels_are_as_exact_as_plain_pytorch(
    kernels: Provider, batch: int, classes: int, grid: tuple[int, int], scope: str, similarity: str, vectors: str
) -> None:
    values = case(batch, classes, grid)
    tolerance = 2e-6 if similarity == "cosine" else 5e-6  # scores of ±70 are rounded to 4e-6
    loss, _ = assert_as_exact(
        kernels, tolerance, values, vectors=vectors, scope=scope, similarity=similarity, epsilon=1.5
    )
    assert grid == (1, 1) or loss > 0


def test_rows_wider_than_a_tile_are_as_exact_as_plain_pytorch(kernels: Provider) -> None:
    """LVIS: the gradient of a row is split over programs."""
    assert_as_exact(kernels, 2e-6, case(1, 1203, (3, 4), labels=2), vectors="probability", epsilon=2.0)


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 2),
    classes=st.integers(1, 35),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    vectors=st.sampled_from(VECTORS),
    scope=st.sampled_from(SCOPES),
    similarity=st.sampled_from(SIMILARITIES),
    temperature=st.floats(0.2, 2.0),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    batch: int, classes: int, grid: tuple[int, int], vectors: str, scope: str, similarity: str, temperature: float,
    seed: int,
) -> None:  # fmt: skip
    kernels = Provider("triton", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    values = case(batch, classes, grid, seed)
    parameters = {"vectors": vectors, "epsilon": 1.5, "temperature": temperature, "scope": scope}
    parameters["similarity"] = similarity
    tolerance = 1e-5 if similarity == "cosine" else 1e-4  # dot products of 35 channels over 0.2 reach 500
    assert_as_exact(kernels, tolerance, values, **parameters)


@pytest.mark.parametrize(("classes", "vectors"), [(20, "logits"), (40, "probability")])
def test_configurations_of_other_hardware_give_the_same_loss(
    kernels: Provider, classes: int, vectors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "architecture", lambda device: "gfx942")
    assert_as_exact(kernels, 2e-6, case(1, classes, (6, 6)), vectors=vectors, epsilon=1.5)


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_computed_in_float32_by_the_kernels(
    kernels: Provider, dtype: torch.dtype, vectors: str
) -> None:
    assert_as_exact(kernels, 2e-6, as_type(case(2, 5, (4, 5)), dtype), vectors=vectors, epsilon=1.5)


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_by_the_definition(dtype: torch.dtype, vectors: str) -> None:
    values = as_type(case(2, 4, (3, 3)), dtype)
    loss, gradient = REFERENCE(**values, vectors=vectors)
    assert gradient.dtype == dtype
    assert torch.equal(loss, REFERENCE(**as_type(values, torch.float32), vectors=vectors)[0])


# What the loss means.


def test_hand_computed_three_pixels(provider: Provider) -> None:
    cam = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]).view(1, 2, 1, 3)  # directions e1, e1, e2
    category = torch.tensor([[[1, 1, 2]]])
    loss, _ = provider(cam, category=category, confidence=torch.ones(1, 1, 3), threshold=0.5, temperature=0.5)
    # Both anchors of class 1: softplus(0 − 1/0.5); the anchor of class 2 has no positive, but counts in |Ω|.
    assert loss.item() == pytest.approx(2 / 3 * math.log1p(math.exp(-2)), rel=1e-6)


def test_hand_computed_probabilities(provider: Provider) -> None:
    """Two present classes and an absent one; q of the pixels: [¼, ¾, ½, 0], [½, ½, ½, 0], [¾, ¼, ¼, 0]."""
    logits = torch.tensor([[math.log(3), 0.0, -math.log(3)], [0.0, 0.0, -math.log(3)], [9.0, 9.0, 9.0]])
    category, image_labels = torch.tensor([[[1, 1, 0]]]), torch.tensor([[1, 1, 0]])
    loss, gradient = provider(
        logits.view(1, 3, 1, 3), category=category, confidence=torch.ones(1, 1, 3), threshold=0.5,
        vectors="probability", image_labels=image_labels, similarity="dot", temperature=1.0,
    )  # fmt: skip
    # The first two are each other's positive; their products with the third are ½ and ⅝.
    first, second = (math.log1p(math.exp(n - 0.75)) for n in (0.25 * 0.75 + 0.75 * 0.25 + 0.125, 0.375 + 0.25))
    assert loss.item() == pytest.approx((first + second) / 3, rel=1e-6)
    assert gradient[:, 2].eq(0).all()


def test_probabilities_agree_with_s2c_where_raw_logits_do_not(provider: Provider) -> None:
    """Why they are the default. At s2c's optimum, σ(M) one-hot by the label and 0 in the background, their cosine is 1
    within a region and 0 across regions, and nothing is left to learn. The logits' cosine of an object and the
    background is (C − 2)/C there: what separates them is raising absent classes in the background, against s2c."""
    classes = 20
    category = torch.tensor([[[0, 0, 0, 3, 3, 7, 7]]])
    image_labels = torch.zeros(1, classes)
    image_labels[0, [2, 6]] = 1
    cam = torch.full((1, classes, 1, 7), -30.0)
    cam[0, 2, 0, 3:5], cam[0, 6, 0, 5:] = 30.0, 30.0
    rest = {"category": category, "confidence": torch.ones(1, 1, 7), "threshold": 0.5, "image_labels": image_labels}

    loss, gradient = provider(cam, vectors="probability", **rest)
    # Positives have s = 1/τc, all negatives (4 of the background's anchors, 5 of the objects') s = 0.
    expected = (3 * math.log1p(4 * math.exp(-2)) + 4 * math.log1p(5 * math.exp(-2))) / 7
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient.abs().max() < 1e-9

    loss, gradient = provider(cam, vectors="logits", **rest)
    across, between = 2 * (classes - 2) / classes, 2 * (classes - 4) / classes
    objects = math.log(3 * math.exp(across) + 2 * math.exp(between))
    expected = 3 * math.log1p(4 * math.exp(across - 2)) + 4 * math.log1p(math.exp(objects - 2))
    assert loss.item() == pytest.approx(expected / 7, rel=1e-5)
    absent = torch.ones(classes, dtype=torch.bool)
    absent[[2, 6]] = False
    assert (gradient[0, absent, 0, :3] < 0).all()  # descent raises them


@pytest.mark.parametrize("tied", [(0, 1), (2, 15), (3, 18)])  # within a tile of channels, and across
def test_of_equal_maxima_the_lowest_class_gets_the_gradient(provider: Provider, tied: tuple[int, int]) -> None:
    classes = 20
    assert tied[1] < CHANNELS[True] or tied == (3, 18)
    values = case(1, classes, (3, 4))
    values["image_labels"][:] = True
    cam = values["cam"].clamp(max=1)
    cam[:, tied] = 2.0
    lower, higher = cam.clone(), cam.clone()
    lower[:, tied[0]] += 1e-5
    higher[:, tied[1]] += 1e-5
    gradient, of_lower, of_higher = (
        provider(**changed(values, cam=maps), vectors="probability", epsilon=10.0)[1] for maps in (cam, lower, higher)
    )
    torch.testing.assert_close(gradient, of_lower, rtol=1e-3, atol=1e-6)
    assert (gradient - of_higher).abs().max() > 100 * (gradient - of_lower).abs().max()


def test_probabilities_that_round_to_one_are_no_tie(kernels: Provider) -> None:
    """σ(20) and σ(25) are 1 in float32; the background is still that of the larger logit, and no gradient is lost."""
    cam = torch.tensor([[20.0, -1.0, 0.0, 1.0], [25.0, 0.5, 2.0, -3.0]]).view(1, 2, 1, 4)
    rest = {
        "category": torch.tensor([[[1, 1, 2, 2]]]), "confidence": torch.ones(1, 1, 4), "threshold": 0.5,
        "image_labels": torch.ones(1, 2), "vectors": "probability", "similarity": "dot",
    }  # fmt: skip
    found, truth = kernels(cam, **rest)[1], REFERENCE(cam.double(), **rest)[1]
    torch.testing.assert_close(found[..., 0].double().cpu(), truth[..., 0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_an_image_without_a_class_is_all_background(provider: Provider, scope: str) -> None:
    """q = [1, 0, …]: no gradient of its own, but within the batch the others' pixels are compared with it."""
    values = case(2, 3, (3, 4))
    values["image_labels"][1] = False
    values["category"][1] = 0
    parameters = {"vectors": "probability", "scope": scope, "epsilon": 10.0}
    loss, gradient = provider(**values, **parameters)
    truth = as_type(values, torch.float64)
    cam = truth["cam"].requires_grad_()
    expected = formula(**truth, **parameters, similarity="cosine")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    of_first = torch.autograd.grad(expected, cam)[0][0].float()
    torch.testing.assert_close(gradient[0].cpu(), of_first, rtol=1e-4, atol=1e-6)
    assert of_first.ne(0).any()
    assert gradient[1].eq(0).all()


def test_a_batch_without_a_class_has_no_gradient(provider: Provider) -> None:
    values = case(2, 3, (2, 3))
    values["image_labels"][:] = False
    loss, gradient = provider(**values, vectors="probability", scope="batch", epsilon=10.0)
    assert loss > 0
    assert gradient.eq(0).all()


def test_background_is_a_label_like_any_other(provider: Provider) -> None:
    cam, category = torch.randn(1, 3, 2, 2), torch.tensor([[[1, 2], [3, 3]]])
    confidence = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])  # the first two fall below the threshold
    labels = torch.tensor([[[0, 0], [3, 3]]])
    found = provider(cam, category=category, confidence=confidence, threshold=0.5)
    assert_equal(found, provider(cam, category=labels, confidence=torch.ones(1, 2, 2), threshold=0.5))


def test_omega_counts_images_without_pairs(provider: Provider) -> None:
    cam, category, confidence = torch.randn(2, 3, 2, 2), torch.ones(2, 2, 2, dtype=torch.uint8), torch.ones(2, 2, 2)
    category[0, 0] = 2
    single, _ = provider(cam[:1], category=category[:1], confidence=confidence[:1], threshold=0.5)
    both, _ = provider(cam, category=category, confidence=confidence, threshold=0.5)
    torch.testing.assert_close(both, single / 2)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("empty", ["valid", "category", "epsilon", "positives", "negatives", "all but one pixel"])
def test_empty_sets_give_loss_and_gradient_zero(provider: Provider, poisoned: None, empty: str, scope: str) -> None:
    category, valid = torch.ones(1, 2, 2, dtype=torch.uint8), torch.ones(1, 2, 2, dtype=torch.bool)
    if empty == "valid":
        valid[:] = False
    elif empty == "category":
        category[:] = 255
    elif empty == "positives":
        category = torch.arange(4).view(1, 2, 2)
    elif empty == "all but one pixel":
        valid.view(-1)[1:] = False
    loss, gradient = provider(
        torch.full((1, 4, 2, 2), 0.5), category=category, confidence=torch.ones(1, 2, 2), threshold=0.5, valid=valid,
        epsilon=0.0 if empty == "epsilon" else 1.0, scope=scope, vectors="probability", image_labels=torch.ones(1, 4),
    )  # fmt: skip
    assert loss.item() == 0
    assert gradient.eq(0).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_images_of_uneven_sizes_pair_as_the_scope_says(kernels: Provider, scope: str) -> None:
    values = case(3, 4, (6, 7))
    values["valid"][0], values["valid"][1] = True, False
    values["valid"][2].view(-1)[1:] = False
    values["category"].clamp_(max=4)
    assert_as_exact(kernels, 2e-6, values, epsilon=10.0, scope=scope)


# Extreme values.


@pytest.mark.parametrize("size", [0.0, 1e-7])
def test_vectors_without_direction_get_no_gradient(provider: Provider, size: float) -> None:
    values = case(1, 3, (4, 4))
    values["cam"][..., 1, :] = size
    values["category"].clamp_(max=2)
    loss, gradient = provider(**changed(values, valid=None), epsilon=10.0)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[..., 1, :].eq(0).all()
    assert gradient[..., 0, :].ne(0).any()


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_logits_of_ten_thousand_stay_exact(kernels: Provider, similarity: str, vectors: str) -> None:
    values = case(1, 3, (5, 5))
    values["cam"] = values["cam"].sign() * 1e4
    loss, gradient = assert_as_exact(kernels, 2e-6, values, vectors=vectors, epsilon=1.5, similarity=similarity)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_small_losses_keep_their_relative_accuracy(provider: Provider) -> None:
    """Well-separated classes: softplus of −40 is e^-40, which log(1 + x) would round to 0."""
    cam, category = torch.eye(2)[:, [0, 0, 1, 1]].view(1, 2, 2, 2), torch.tensor([[[1, 1], [2, 2]]])
    loss, _ = provider(cam, category=category, confidence=torch.ones(1, 2, 2), threshold=0.5, temperature=0.025)
    torch.testing.assert_close(loss.double().cpu(), 2 * torch.tensor(-40.0).double().exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("outside", [-1.0, 0.0, 1.0, 7.0])
def test_threshold_tensors_outside_the_range_are_kept_inside(kernels: Provider, outside: float) -> None:
    values = changed(case(1, 3, (3, 4)), threshold=torch.tensor(outside, dtype=torch.float64))
    found, plain = (run(**values, epsilon=20.0) for run in (kernels, REFERENCE))
    assert found[0].isfinite()
    torch.testing.assert_close([each.cpu() for each in found], list(plain))


# How arguments are read.


@pytest.mark.parametrize(
    ("dtype", "unknown"),
    [
        (torch.uint8, [4, 255]), (torch.int8, [-1, -128]), (torch.int16, [-5, 300]),
        (torch.int64, [2**40, -(2**40) + 1]), (torch.int32, [4, 2**31 - 1]),
    ],
)  # fmt: skip
def test_categories_out_of_range_are_ignored(provider: Provider, dtype: torch.dtype, unknown: list[int]) -> None:
    values = case(1, 3, (4, 5))
    category = values["category"].clamp(max=3).to(dtype)
    marked, valid = category.clone(), values["valid"].clone()
    valid[0, 0] = valid[0, 2, 1] = False
    marked[0, 0], marked[0, 2, 1] = unknown[0], unknown[1]
    expected = provider(**changed(values, category=category, valid=valid), epsilon=1.5)
    assert expected[0] > 0
    assert_equal(provider(**changed(values, category=marked), epsilon=1.5), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16])
def test_image_labels_of_any_type_mean_present_where_positive(provider: Provider, dtype: torch.dtype) -> None:
    values = case(2, 5, (3, 4))
    expected = provider(**values, vectors="probability", epsilon=1.5)
    written = torch.where(values["image_labels"], 2, 0 if dtype == torch.uint8 else -1).to(dtype)
    assert_equal(provider(**changed(values, image_labels=written), vectors="probability", epsilon=1.5), expected)


def test_logits_do_not_read_image_labels(provider: Provider) -> None:
    values = case(2, 5, (3, 4))
    expected = provider(**changed(values, image_labels=None))
    assert_equal(provider(**values), expected)


def test_no_valid_mask_means_that_all_are_valid(provider: Provider) -> None:
    values = case(1, 3, (4, 5))
    everywhere = provider(**changed(values, valid=torch.ones_like(values["valid"])))
    assert everywhere[0] > 0
    assert_equal(provider(**changed(values, valid=None)), everywhere)


def test_absent_classes_and_unused_pixels_are_not_looked_at(provider: Provider) -> None:
    values = case(2, 4, (3, 4))
    absent = ~values["image_labels"][:, :, None, None] | ~values["valid"][:, None]
    filled = changed(values, cam=values["cam"].masked_fill(absent, 77.0))
    for found, expected in zip(
        provider(**filled, vectors="probability", epsilon=2.0),
        provider(**values, vectors="probability", epsilon=2.0),
        strict=True,
    ):
        assert torch.equal(found, expected)


def low_level(values: Case, vectors: str = "logits", scope: str = "image") -> tuple[Any, ...]:
    """The arguments of the operator beneath the public function."""
    labels = values["image_labels"] if vectors == "probability" else None
    maps = (values["category"], values["confidence"], torch.tensor(THRESHOLD, device=values["cam"].device))
    return values["cam"], labels, *maps, values["valid"], 1.5, 0.5, 0.8, scope == "image", True


def on(device: torch.device, values: Case) -> Case:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}


@pytest.mark.parametrize("turn", range(4))
def test_layouts_are_read_in_place(kernels: Provider, poisoned: None, turn: int) -> None:
    """Every argument in every layout, and never two arguments of a call in the same one."""
    names = ["cam", "category", "confidence", "valid"]
    values = on(kernels.device, case(2, 5, (3, 4)))
    changes = {}
    for index, name in enumerate(names):
        changes[name] = [("contiguous", values[name]), *layouts(values[name])][(index + turn) % 4][1]
    labels = values["image_labels"]
    changes["image_labels"] = [labels, *(view for _, view in layouts(labels))][(1 + turn) % 4]
    upstream = torch.ones((), device=kernels.device).expand(2)
    found = []
    for inputs in (low_level(values, "probability", "batch"), low_level(values | changes, "probability", "batch")):
        sums, *saved = _run_forward(*inputs)
        backward = partial(_run_backward, upstream, *inputs[:2], *saved, 0.5, True)
        found.append((sums, backward()))
    assert_equal(*found)
    assert_no_copies(partial(_run_forward, *inputs))
    assert_no_copies(backward)


def far(tensor: Tensor) -> Tensor:
    """The values of a batch of 4 with images 2^30 elements apart; only the pages that they touch are ever used."""
    base = torch.empty(3 * 2**30 + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
    view = base.as_strided(tensor.shape, (2**30, *tensor.stride()[1:]))
    return view.copy_(tensor)


def test_offsets_beyond_two_to_the_31_reach_their_elements(kernels: Provider) -> None:
    values = on(kernels.device, case(4, 2, (2, 3)))
    values |= {"cam": values["cam"].half(), "category": values["category"].clamp(max=3).to(torch.uint8)}
    parameters = {"epsilon": 10.0, "scope": "batch", "vectors": "probability"}
    expected = kernels(**values, **parameters)
    apart = {name: far(values[name]) for name in ("cam", "category", "valid", "image_labels")}
    found = kernels(**changed(values, **apart), **parameters)
    assert expected[1][3].ne(0).any()
    assert_equal(found, expected)


# Ω as rows.


def selection(values: Case, scope: str, limit: float, vectors: str = "logits") -> contrastive_rows.Rows:
    cam, labels, category, confidence, threshold, valid, *_ = low_level(values, vectors)
    return select_rows(cam, labels, category, confidence, threshold, valid, limit, 0.8, scope == "image", True)


@pytest.mark.parametrize(
    ("batch", "grid", "scope"), [(3, (7, 10), "image"), (3, (7, 10), "batch"), (2, (28, 28), "batch")]
)
def test_partition_keeps_the_order_of_the_pixels(
    kernel_device: torch.device, poisoned: None, batch: int, grid: tuple[int, int], scope: str
) -> None:
    values = case(batch, 1, grid)
    values["valid"][1] = False  # an image without Ω between others
    rows = selection(on(kernel_device, values), scope, _limit(1.0, 1.0))
    features, labels, slots, counts, inverse_norms = (each.cpu() for each in rows)
    label, usable = reference.pseudo_labels(values["confidence"], values["category"], THRESHOLD, values["valid"], 1)
    selected = usable & (reference.perplexity(values["confidence"], THRESHOLD) <= 1.0)
    groups = batch if scope == "image" else 1
    selected, label = selected.view(groups, -1), label.view(groups, -1)
    assert torch.equal(counts, selected.sum(1).int())
    first = torch.arange(groups)[:, None] * selected.shape[1]
    expected = (selected.cumsum(1) - 1 + first).masked_fill(~selected, -1)
    assert torch.equal(slots.view(groups, -1), expected.int())
    cam = values["cam"].view(groups, -1)
    for group, count in enumerate(counts.tolist()):
        of_group = labels.view(groups, -1)[group]
        assert torch.equal(of_group[:count], label[group][selected[group]].int())
        assert of_group[count:].eq(-1).all()
        of_group, chosen = features.view(groups, -1, features.shape[1])[group], cam[group][selected[group]]
        torch.testing.assert_close(of_group[:count, 0], chosen.sign())  # one channel: x/‖x‖ is the sign
        torch.testing.assert_close(inverse_norms.view(groups, -1)[group, :count], 1 / chosen.abs())
        assert of_group[count:].eq(0).all()
        assert of_group[:, 1:].eq(0).all()


@pytest.mark.parametrize("classes", [1, 15, 16, 31, 32, 40])
def test_rows_of_probabilities_end_in_the_background(kernel_device: torch.device, poisoned: None, classes: int) -> None:
    values = case(1, classes, (3, 4))
    rows = selection(on(kernel_device, values), "image", _limit(10.0, 1.0), "probability")
    y = values["image_labels"][:, :, None, None]
    q = torch.cat((y * values["cam"].sigmoid(), 1 - (y * values["cam"].sigmoid()).amax(1, keepdim=True)), 1)
    chosen = rows.slots.cpu() >= 0
    expected = torch.nn.functional.normalize(q.flatten(2)[0].T[chosen], dim=1)
    found = rows.features.cpu()[: len(expected)]
    torch.testing.assert_close(found[:, : classes + 1], expected)
    assert found[:, classes + 1 :].eq(0).all()


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_selection_agrees_with_the_perplexity_up_to_rounding(kernel_device: torch.device, beta: float) -> None:
    confidence = torch.linspace(0, 1, 401, device=kernel_device).view(1, 1, -1)
    values = {
        "cam": torch.ones(1, 1, 1, 401, device=kernel_device), "confidence": confidence,
        "category": torch.ones_like(confidence, dtype=torch.uint8), "valid": torch.ones_like(confidence).bool(),
    }  # fmt: skip
    scores = reference.perplexity(confidence, THRESHOLD, 0.8, beta)
    epsilon = float(scores[0, 0, 350])  # a pixel of the boundary itself
    slots = selection(values, "image", _limit(epsilon, beta)).slots
    differ = (slots.view_as(scores) >= 0) != (scores <= epsilon)
    assert 0 < int((scores <= epsilon).sum()) < 401
    assert not (differ & ((scores / epsilon - 1).abs() > 1e-6)).any()


@pytest.mark.parametrize(("epsilon", "beta", "count"), [(0.0, 1.0, 0), (0.99, 0.0, 0), (1.0, 0.0, 12), (1e30, 0.1, 12)])
def test_extreme_bounds_select_nothing_or_everything(
    kernel_device: torch.device, epsilon: float, beta: float, count: int
) -> None:
    values = on(kernel_device, case(1, 2, (3, 4)))
    values |= {"category": values["category"].clamp(max=2), "valid": torch.ones_like(values["valid"])}
    cam, labels, category, confidence, threshold, valid, *_ = arguments = low_level(values)
    sums = _forward(*arguments[:6], _limit(epsilon, beta), *arguments[7:])[0]
    assert sums[1].item() == count
    keywords: dict[str, Any] = {"epsilon": epsilon, "temperature": 0.5, "alpha": 0.8, "beta": beta, "scope": "image"}
    expected = reference.contrastive_separation(
        cam, labels, category, confidence, threshold, valid, **keywords, similarity="cosine"
    )
    torch.testing.assert_close(sums, expected)


# The operator.


@pytest.mark.parametrize(("scope", "vectors"), [("image", "logits"), ("batch", "probability")])
def test_every_element_of_results_and_buffers_is_written(
    kernel_device: torch.device, poisoned: None, scope: str, vectors: str
) -> None:
    inputs = low_level(on(kernel_device, case(2, 3, (5, 9))), vectors, scope)
    results = _run_forward(*inputs)
    for result in results:
        assert result.isfinite().all() if result.is_floating_point() else (result < 2**31 - 1).all()
    upstream = torch.ones(2, device=kernel_device)
    assert _run_backward(upstream, *inputs[:2], *results[1:], 0.5, True).isfinite().all()


@pytest.mark.parametrize("vectors", VECTORS)
def test_repeated_runs_give_the_same_bits(provider: Provider, vectors: str) -> None:
    values = case(2, 20, (5, 7))
    first, second = (provider(**values, vectors=vectors, epsilon=1.5, scope="batch") for _ in range(2))
    assert_equal(first, second)


def test_gradient_comes_from_the_sum_of_losses_alone(kernel_device: torch.device) -> None:
    inputs = low_level(on(kernel_device, case(1, 3, (4, 4))), "probability")
    sums, *saved = _forward(*inputs)
    assert sums[1] > 1
    alone, both, twice = (
        _backward(torch.tensor(upstream, device=kernel_device), *inputs[:2], *saved, 0.5, True)
        for upstream in ([1.0, 0.0], [1.0, 5.0], [2.0, 0.0])
    )
    assert alone.ne(0).any()
    assert torch.equal(alone, both)
    assert torch.equal(2 * alone, twice)


def test_registration(kernel_device: torch.device) -> None:
    values = on(kernel_device, case(1, 3, (2, 3)))
    cam, *rest = low_level(values, "probability")
    torch.library.opcheck(_forward, (cam.detach().requires_grad_(), *rest))
    torch.library.opcheck(_forward, low_level(values), test_utils="test_faketensor")  # without image labels
    saved = _forward(cam, *rest)[1:]
    upstream = torch.ones(2, device=kernel_device)
    torch.library.opcheck(_backward, (upstream, cam, rest[0], *(each.detach() for each in saved), 0.5, True))

    def loss(cam: Tensor) -> Tensor:
        return contrastive_separation(**changed(values, cam=cam), vectors="probability", backend="triton")

    assert_fullgraph(loss, cam)
