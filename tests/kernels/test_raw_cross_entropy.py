"""perplexity and raw_cross_entropy: hand-computed values, F.cross_entropy equivalences, gradients, degenerate cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosa_fast.kernels import perplexity, raw_cross_entropy


def case(batch: int, channels: int, grid: tuple[int, int], size: tuple[int, int], seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, channels, *grid, generator=generator, dtype=torch.float64)
    confidence = torch.rand(batch, *size, generator=generator, dtype=torch.float64)
    category = torch.randint(0, channels, (batch, *size), generator=generator)
    category[torch.rand(batch, *size, generator=generator) < 0.1] = 255
    valid = torch.rand(batch, *size, generator=generator) < 0.7
    return logits, confidence, category.to(torch.uint8), valid


def pseudo_label(confidence: Tensor, category: Tensor, threshold: float, valid: Tensor, channels: int) -> Tensor:
    label = torch.where(confidence >= threshold, category.long(), 0)
    return label.masked_fill(~valid | (category.long() >= channels), 255)


def upsampled_ce(logits: Tensor, label: Tensor) -> Tensor:
    up = F.interpolate(logits, size=tuple(label.shape[1:]), mode="bilinear", align_corners=False)
    return F.cross_entropy(up, label, ignore_index=255, reduction="none")


@pytest.mark.parametrize(("confidence", "expected"), [
    (1.0, -math.log(0.8)),  # d = 1 above
    (0.7, -math.log(0.8 * 0.5)),  # halfway above
    (0.2, -math.log(0.8 * 0.5)),  # halfway below
    (0.0, -math.log(0.8)),
    (0.4, -math.log(0.8e-4)),  # at the threshold: d is cut off
])  # fmt: skip
def test_perplexity_by_hand(confidence: float, expected: float) -> None:
    value = perplexity(torch.tensor([confidence], dtype=torch.float64), 0.4)
    assert value.item() == pytest.approx(expected)
    assert perplexity(torch.tensor([confidence]), torch.tensor(0.4), beta=2.0).item() == pytest.approx(expected**2)


def test_perplexity_is_one_without_beta_and_float32_for_half() -> None:
    confidence = torch.rand(5, 5).to(torch.bfloat16)
    assert perplexity(confidence, 0.3, beta=0.0).eq(1).all()
    assert perplexity(confidence, 0.3).dtype == torch.float32


def test_perplexity_gradcheck() -> None:
    confidence = torch.tensor([0.05, 0.3, 0.55, 0.9], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda value: perplexity(value, 0.4, 0.7, 1.5), confidence)


@pytest.mark.parametrize("channels", [2, 3, 21, 81])
def test_unit_reliability_is_the_mean_cross_entropy(channels: int) -> None:
    logits, confidence, category, valid = case(2, channels, (4, 3), (13, 11))
    loss = raw_cross_entropy(logits, confidence, category, 0.4, valid, beta=0.0)
    label = pseudo_label(confidence, category, 0.4, valid, channels)
    expected = F.cross_entropy(F.interpolate(logits, (13, 11), mode="bilinear"), label, ignore_index=255)
    torch.testing.assert_close(loss, expected)


def test_reliability_weights_are_inverse_perplexity_over_the_batch() -> None:
    logits, confidence, category, valid = case(3, 5, (4, 4), (9, 10))
    loss = raw_cross_entropy(logits, confidence, category, 0.3, valid, alpha=0.6, beta=1.5)
    label = pseudo_label(confidence, category, 0.3, valid, 5)
    weight = (label != 255) / perplexity(confidence, 0.3, 0.6, 1.5)
    torch.testing.assert_close(loss, (weight * upsampled_ce(logits, label)).sum() / weight.sum())


def test_class_balance_normalises_each_side() -> None:
    logits, confidence, category, valid = case(2, 4, (3, 3), (8, 8))
    loss = raw_cross_entropy(logits, confidence, category, 0.6, valid, foreground_weight=0.3)
    label = pseudo_label(confidence, category, 0.6, valid, 4)
    ce, weight = upsampled_ce(logits, label), 1 / perplexity(confidence, 0.6)
    foreground, background = (label > 0) & (label != 255), label == 0
    sides = [(weight * ce)[side].sum() / weight[side].sum() for side in (foreground, background)]
    torch.testing.assert_close(loss, 0.3 * sides[0] + 0.7 * sides[1])


@pytest.mark.parametrize(("level", "share"), [(0.9, 0.3), (0.1, 0.7)])
def test_an_empty_side_contributes_nothing_and_the_other_keeps_its_share(level: float, share: float) -> None:
    logits = torch.randn(1, 3, 4, 4)
    confidence, category = torch.full((1, 4, 4), level), torch.ones(1, 4, 4, dtype=torch.uint8)
    balanced = raw_cross_entropy(logits, confidence, category, 0.5, foreground_weight=0.3)
    torch.testing.assert_close(balanced, share * raw_cross_entropy(logits, confidence, category, 0.5))


def test_band_ignores_what_lies_between() -> None:
    logits, confidence, category, valid = case(2, 4, (3, 3), (8, 8))
    confidence[0, 0, :2] = torch.tensor([0.25, 0.7], dtype=torch.float64)
    category[0, 0, :2] = 2
    valid[0, 0, :2] = True
    loss = raw_cross_entropy(logits, confidence, category, 0.5, valid, beta=0.0, ignore_band=(0.25, 0.7))
    label = pseudo_label(confidence, category, 0.7, valid, 4)
    label[(confidence > 0.25) & (confidence < 0.7)] = 255
    assert label[0, 0, :2].tolist() == [0, 2]
    ce = upsampled_ce(logits, label)
    torch.testing.assert_close(loss, ce.sum() / (label != 255).sum())


def test_several_targets_equal_single_calls_with_their_own_thresholds() -> None:
    logits, confidence, category, valid = case(2, 6, (3, 4), (7, 9))
    confidences, categories = torch.stack((confidence, 1 - confidence)), torch.stack((category, category.flip(1)))
    thresholds = torch.tensor([0.3, 0.7], dtype=torch.float64)
    losses = raw_cross_entropy(logits, confidences, categories, thresholds, valid, foreground_weight=0.5)
    assert losses.shape == (2,)
    for index, loss in enumerate(losses):
        single = raw_cross_entropy(
            logits, confidences[index], categories[index], float(thresholds[index]), valid, foreground_weight=0.5
        )
        torch.testing.assert_close(loss, single)
    shared = raw_cross_entropy(logits, confidences, categories, 0.4, valid)
    torch.testing.assert_close(shared[1], raw_cross_entropy(logits, confidences[1], categories[1], 0.4, valid))


@pytest.mark.parametrize("foreground_weight", [None, 0.5])
def test_gradcheck_of_the_logits(foreground_weight: float | None) -> None:
    logits, confidence, category, valid = case(2, 3, (2, 3), (5, 7))
    confidences, categories = torch.stack((confidence, 1 - confidence)), torch.stack((category, category))

    def losses(value: Tensor) -> Tensor:
        return raw_cross_entropy(
            value, confidences, categories, torch.tensor([0.3, 0.6]), valid, foreground_weight=foreground_weight
        )

    torch.autograd.gradcheck(losses, logits.requires_grad_())


def test_gradient_is_weighted_softmax_minus_one_hot() -> None:
    logits = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    confidence = torch.rand(1, 4, 4, dtype=torch.float64)
    category = torch.randint(1, 3, (1, 4, 4), dtype=torch.uint8)
    raw_cross_entropy(logits, confidence, category, 0.5).backward()
    weight = 1 / perplexity(confidence, 0.5)
    label = torch.where(confidence >= 0.5, category.long(), 0)
    expected = (weight / weight.sum())[:, None] * (logits.softmax(1) - F.one_hot(label, 3).permute(0, 3, 1, 2))
    torch.testing.assert_close(logits.grad, expected.detach())


@pytest.mark.parametrize("nothing", ["valid", "category", "band"])
def test_nothing_usable_gives_loss_and_gradient_zero(nothing: str) -> None:
    logits, confidence, category, valid = case(2, 3, (2, 2), (6, 6))
    logits.requires_grad_()
    band = (0.0, 1.0) if nothing == "band" else None
    confidence = confidence.clamp(0.01, 0.99)
    valid = valid & (nothing != "valid")
    category = torch.full_like(category, 255) if nothing == "category" else category
    for weight in (None, 0.5):
        loss = raw_cross_entropy(logits, confidence, category, 0.5, valid, foreground_weight=weight, ignore_band=band)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert gradient.eq(0).all()


def test_one_valid_pixel_is_its_cross_entropy() -> None:
    logits, confidence, category, _ = case(1, 3, (4, 4), (4, 4))
    confidence[0, 2, 1], category[0, 2, 1] = 0.9, 2
    valid = torch.zeros(1, 4, 4, dtype=torch.bool)
    valid[0, 2, 1] = True
    loss = raw_cross_entropy(logits, confidence, category, 0.5, valid)
    torch.testing.assert_close(loss, -logits[0, :, 2, 1].log_softmax(0)[2])


def test_category_zero_is_background_and_beyond_the_classes_is_ignored() -> None:
    logits = torch.randn(1, 3, 1, 3)
    confidence = torch.tensor([[[0.9, 0.9, 0.1]]])
    loss = raw_cross_entropy(logits, confidence, torch.tensor([[[0, 3, 255]]]), 0.5)
    torch.testing.assert_close(loss, -logits[0, :, 0, 0].log_softmax(0)[0])


def test_logits_of_ten_thousand_stay_finite() -> None:
    logits, confidence, category, valid = case(2, 3, (3, 3), (8, 8))
    logits = (logits.sign() * 1e4).float().requires_grad_()
    loss = raw_cross_entropy(logits, confidence, category, 0.5, valid, foreground_weight=0.5)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    truth = raw_cross_entropy(logits.detach().double(), confidence, category, 0.5, valid, foreground_weight=0.5)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)


def test_float_threshold_and_tensor_threshold_agree() -> None:
    logits, confidence, category, valid = case(2, 3, (3, 3), (8, 8))
    losses = [
        raw_cross_entropy(logits, confidence, category, threshold, valid)
        for threshold in (0.37, torch.tensor(0.37, dtype=torch.float64))
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits, confidence, category, valid = case(2, 5, (3, 3), (8, 8))
    logits, confidence = logits.to(dtype).requires_grad_(), confidence.float()
    loss = raw_cross_entropy(logits, confidence, category, 0.5, valid)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(
        loss, raw_cross_entropy(logits.detach().float(), confidence, category, 0.5, valid), rtol=0, atol=0
    )


def test_strides_and_repetition_do_not_change_the_result() -> None:
    logits, confidence, category, valid = (value.float() if value.is_floating_point() else value
                                           for value in case(2, 5, (3, 4), (8, 9)))  # fmt: skip
    results = []
    for layout in (logits, logits.contiguous(memory_format=torch.channels_last), logits.mT.contiguous().mT):
        leaf = layout.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = raw_cross_entropy(leaf, confidence.mT.contiguous().mT, category, 0.5, valid.mT.contiguous().mT)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    again = raw_cross_entropy(logits, confidence, category, 0.5, valid)
    assert torch.equal(again, raw_cross_entropy(logits, confidence, category, 0.5, valid))
    for loss, gradient in results:
        torch.testing.assert_close(loss, again)
        torch.testing.assert_close(gradient, results[0][1])


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(2, 6),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    threshold=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
def test_equals_the_definition_for_every_shape(
    batch: int, channels: int, grid: tuple[int, int], size: tuple[int, int], threshold: float, seed: int
) -> None:
    logits, confidence, category, valid = case(batch, channels, grid, size, seed)
    loss = raw_cross_entropy(logits, confidence, category, threshold, valid)
    label = pseudo_label(confidence, category, threshold, valid, channels)
    weight = (label != 255) / perplexity(confidence, threshold)
    expected = (weight * upsampled_ce(logits, label)).sum() / weight.sum().clamp(min=1e-12)
    torch.testing.assert_close(loss, expected)
