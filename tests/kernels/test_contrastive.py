"""contrastive_separation against the double loop of eq. 10, its gradients and degenerate cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosa_fast.kernels import contrastive_separation, perplexity


def loss_by_hand(
    cam: Tensor,
    category: Tensor,
    confidence: Tensor,
    threshold: float,
    valid: Tensor,
    scope: str = "image",
    similarity: str = "cosine",
    epsilon: float = 1.0,
    temperature: float = 0.5,
) -> float:
    """Eq. 10 pixel by pixel."""
    batch, classes, height, width = cam.shape
    pixels = []
    scores = perplexity(confidence, threshold)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                known = int(category[b, y, x]) <= classes and bool(valid[b, y, x])
                if known and float(scores[b, y, x]) <= epsilon:
                    label = int(category[b, y, x]) if float(confidence[b, y, x]) >= threshold else 0
                    pixels.append((b, label, cam[b, :, y, x].tolist()))

    def similar(a: list[float], b: list[float]) -> float:
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        return dot / (math.hypot(*a) * math.hypot(*b)) if similarity == "cosine" else dot

    total = 0.0
    for i, (image, label, vector) in enumerate(pixels):
        others = [p for j, p in enumerate(pixels) if j != i and (scope == "batch" or p[0] == image)]
        positives = [similar(vector, p[2]) / temperature for p in others if p[1] == label]
        negatives = [similar(vector, p[2]) / temperature for p in others if p[1] != label]
        if positives and negatives:
            repulsion = sum(math.exp(n) for n in negatives)
            total += sum(-math.log(math.exp(p) / (math.exp(p) + repulsion)) for p in positives) / len(positives)
    return total / max(len(pixels), 1)


def case(batch: int, classes: int, grid: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randn(batch, classes, *grid, generator=generator, dtype=torch.float64)
    category = torch.randint(0, classes + 1, (batch, *grid), generator=generator)
    category[torch.rand(batch, *grid, generator=generator) < 0.1] = 255
    confidence = torch.rand(batch, *grid, generator=generator, dtype=torch.float64)
    valid = torch.rand(batch, *grid, generator=generator) < 0.8
    return cam, category.to(torch.uint8), confidence, valid


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    scope=st.sampled_from(["image", "batch"]),
    similarity=st.sampled_from(["cosine", "dot"]),
    seed=st.integers(0, 1000),
)
def test_equals_the_double_loop(
    batch: int, classes: int, grid: tuple[int, int], scope: str, similarity: str, seed: int
) -> None:
    cam, category, confidence, valid = case(batch, classes, grid, seed)
    loss = contrastive_separation(cam, category, confidence, 0.4, valid, scope=scope, similarity=similarity)
    expected = loss_by_hand(cam, category, confidence, 0.4, valid, scope, similarity)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gradcheck_of_the_cam(scope: str, similarity: str) -> None:
    cam, category, confidence, valid = case(2, 3, (3, 3))

    def loss(value: Tensor) -> Tensor:
        return contrastive_separation(
            value, category, confidence, 0.4, valid, epsilon=1.5, scope=scope, similarity=similarity
        )

    assert loss(cam).item() > 0
    torch.autograd.gradcheck(loss, cam.requires_grad_())


def test_hand_computed_three_pixels() -> None:
    cam = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]).view(1, 2, 1, 3)  # directions e1, e1, e2
    category = torch.tensor([[[1, 1, 2]]])
    loss = contrastive_separation(cam, category, torch.ones(1, 1, 3), 0.5, temperature=0.5)
    # Both anchors of class 1: softplus(0 − 1/0.5); the anchor of class 2 has no positive, but counts in |Ω|.
    assert loss.item() == pytest.approx(2 / 3 * math.log1p(math.exp(-2)), rel=1e-6)


def test_background_is_a_label_like_any_other() -> None:
    cam, category = torch.randn(1, 3, 2, 2), torch.tensor([[[1, 2], [3, 3]]])
    confidence = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])  # the first two fall below the threshold
    labels = torch.tensor([[[0, 0], [3, 3]]])
    loss = contrastive_separation(cam, category, confidence, 0.5)
    torch.testing.assert_close(loss, contrastive_separation(cam, labels, torch.ones(1, 2, 2), 0.5))


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("empty", ["valid", "epsilon", "category", "positives", "negatives", "all but one pixel"])
def test_empty_sets_give_loss_and_gradient_zero(empty: str, scope: str) -> None:
    cam = torch.randn(1, 3, 2, 2, requires_grad=True)
    category, confidence = torch.ones(1, 2, 2, dtype=torch.uint8), torch.ones(1, 2, 2)
    valid = torch.ones(1, 2, 2, dtype=torch.bool)
    if empty == "valid":
        valid[:] = False
    elif empty == "category":
        category[:] = 255
    elif empty == "positives":
        category, confidence = torch.tensor([[[0, 1], [2, 3]]]), confidence
    elif empty == "all but one pixel":
        valid[0, 0, :], valid[0, 1, 0] = False, False
    epsilon = 0.0 if empty == "epsilon" else 1.0
    loss = contrastive_separation(cam, category, confidence, 0.5, valid, epsilon=epsilon, scope=scope)
    (gradient,) = torch.autograd.grad(loss, cam)
    assert loss.item() == 0
    assert gradient.eq(0).all()


def test_omega_of_the_batch_counts_images_without_pairs() -> None:
    cam, category, confidence = torch.randn(2, 3, 2, 2), torch.ones(2, 2, 2, dtype=torch.uint8), torch.ones(2, 2, 2)
    category[0, 0] = 2
    single = contrastive_separation(cam[:1], category[:1], confidence[:1], 0.5)
    torch.testing.assert_close(contrastive_separation(cam, category, confidence, 0.5), single / 2)


def test_zero_vectors_keep_gradients_finite() -> None:
    cam = torch.randn(1, 3, 2, 2)
    cam[..., 0, 0] = 0
    cam.requires_grad_()
    category = torch.tensor([[[1, 1], [2, 2]]])
    loss = contrastive_separation(cam, category, torch.ones(1, 2, 2), 0.5)
    loss.backward()
    assert loss.isfinite()
    assert cam.grad is not None
    assert cam.grad.isfinite().all()
    assert cam.grad[..., 0, 0].eq(0).all()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_logits_of_ten_thousand_stay_finite(similarity: str) -> None:
    cam = (torch.randn(1, 3, 3, 3).sign() * 1e4).requires_grad_()
    category = torch.randint(1, 4, (1, 3, 3))
    loss = contrastive_separation(cam, category, torch.ones(1, 3, 3), 0.5, similarity=similarity)
    loss.backward()
    assert loss.isfinite()
    assert cam.grad is not None
    assert cam.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    cam, category, confidence, valid = case(2, 4, (3, 3))
    cam, confidence = cam.to(dtype).requires_grad_(), confidence.to(dtype)
    loss = contrastive_separation(cam, category, confidence, 0.4, valid)
    (gradient,) = torch.autograd.grad(loss, cam)
    assert gradient.dtype == dtype
    expected = contrastive_separation(cam.detach().float(), category, confidence.float(), 0.4, valid)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_strides_and_unread_pixels_do_not_matter() -> None:
    cam, category, confidence, valid = case(2, 4, (3, 4))
    expected = contrastive_separation(cam, category, confidence, torch.tensor(0.4, dtype=torch.float64), valid)
    cam[~valid[:, None].expand_as(cam)] = 77.0
    loss = contrastive_separation(
        cam.contiguous(memory_format=torch.channels_last), category.mT.contiguous().mT, confidence, 0.4, valid
    )
    torch.testing.assert_close(loss, expected)
