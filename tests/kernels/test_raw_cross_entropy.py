"""raw_cross_entropy against F.cross_entropy and values by hand, and, kernels against definition, float64."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DEVICE, assert_fullgraph, assert_no_copies, assert_same, assert_three_way, layouts
from torch import Tensor

from cosa_fast.kernels import perplexity, raw_cross_entropy, reference
from cosa_fast.kernels.launch import runtime
from cosa_fast.kernels.launch.table import configuration
from cosa_fast.kernels.raw_cross_entropy import _backward, _forward, _run_corners, _run_forward, _run_gather

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEFAULTS: dict[str, Any] = {"alpha": 0.8, "beta": 1.0, "ignore_band": None}
Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Arguments of a call with T targets."""

    logits: Tensor
    confidence: Tensor
    category: Tensor
    threshold: Tensor
    valid: Tensor | None

    def tensors(self) -> tuple[Any, ...]:
        return self.logits, self.confidence, self.category, self.threshold, self.valid

    def double(self) -> "Case":
        threshold = self.threshold.double()
        return replace(self, logits=self.logits.double(), confidence=self.confidence.double(), threshold=threshold)


def case(
    classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    batch: int = 1,
    targets: int = 2,
    dtype: torch.dtype = torch.float32,
    category: torch.dtype = torch.int16,
    device: torch.device | str = "cpu",
) -> Case:
    """Foreground classes C, (h, w) and (H, W); some categories beyond C, some pixels invalid."""
    generator = torch.Generator().manual_seed(classes + 7 * size[0] + size[1])
    pixels = (targets, batch, *size)
    return Case(
        (3 * torch.randn(batch, classes + 1, *grid, generator=generator)).to(device, dtype),
        torch.rand(pixels, generator=generator).to(device),
        torch.randint(0, classes + 2, pixels, generator=generator).to(device, category),
        torch.linspace(0.3, 0.6, targets).to(device),
        (torch.rand(batch, *size, generator=generator) < 0.8).to(device),
    )


def one_target(batch: int, channels: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Logits, confidence, category and valid mask in float64."""
    given_case = case(channels - 1, grid, size, batch=batch, targets=1, category=torch.uint8).double()
    assert given_case.valid is not None
    return given_case.logits, given_case.confidence[0], given_case.category[0], given_case.valid


def evaluate(given_case: Case, backend: str, **options: Any) -> Result:
    """Losses and the gradient of their weighted sum."""
    logits, *rest = given_case.tensors()
    logits = logits.detach().requires_grad_()
    losses = raw_cross_entropy(logits, *rest, backend=backend, **options)
    weights = torch.linspace(1, -0.5, len(losses), dtype=losses.dtype, device=losses.device)
    return losses.detach(), torch.autograd.grad((losses * weights).sum(), logits)[0]


def compare(given_case: Case, tolerance: float = 2e-6, backend: str = "triton", **options: Any) -> Result:
    """Three-way check of losses and gradient; the results of the kernels, or of another back-end."""
    found, plain = (evaluate(given_case, each, **options) for each in (backend, "reference"))
    truth = evaluate(given_case.double(), "reference", **options)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == given_case.logits.dtype
    for name, a, b, c in zip(("loss", "gradient"), found, plain, truth, strict=True):
        assert_three_way(a, b, c, tolerance, name)
    return found


# --- what the definition is ------------------------------------------------------------------------------------------


def pseudo_label(confidence: Tensor, category: Tensor, threshold: float, valid: Tensor, channels: int) -> Tensor:
    label = torch.where(confidence >= threshold, category.long(), 0)
    return label.masked_fill(~valid | (category.long() >= channels), 255)


def upsampled_ce(logits: Tensor, label: Tensor) -> Tensor:
    up = F.interpolate(logits, size=tuple(label.shape[1:]), mode="bilinear", align_corners=False)
    return F.cross_entropy(up, label, ignore_index=255, reduction="none")


@pytest.mark.parametrize("channels", [2, 3, 21, 81])
def test_unit_reliability_is_the_mean_cross_entropy(channels: int) -> None:
    logits, confidence, category, valid = one_target(2, channels, (4, 3), (13, 11))
    loss = raw_cross_entropy(logits, confidence, category, 0.4, valid, beta=0.0)
    label = pseudo_label(confidence, category, 0.4, valid, channels)
    expected = F.cross_entropy(F.interpolate(logits, (13, 11), mode="bilinear"), label, ignore_index=255)
    torch.testing.assert_close(loss, expected)


def test_reliability_weights_are_inverse_perplexity_over_the_batch() -> None:
    logits, confidence, category, valid = one_target(3, 5, (4, 4), (9, 10))
    loss = raw_cross_entropy(logits, confidence, category, 0.3, valid, alpha=0.6, beta=1.5)
    label = pseudo_label(confidence, category, 0.3, valid, 5)
    weight = (label != 255) / perplexity(confidence, 0.3, 0.6, 1.5)
    torch.testing.assert_close(loss, (weight * upsampled_ce(logits, label)).sum() / weight.sum())


def test_class_balance_normalises_each_side() -> None:
    logits, confidence, category, valid = one_target(2, 4, (3, 3), (8, 8))
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


def test_targets_have_bands_of_their_own(each_way: str, kernel_device: torch.device) -> None:
    """One call with two bands gives what two calls give, in values and in the gradient."""
    given_case = case(4, (2, 3), (7, 9), targets=2, device=kernel_device)
    logits, confidence, category, threshold, valid = given_case.tensors()
    bands = [(0.2, 0.7), (0.35, 0.5)]
    results = []
    for together in (True, False):
        leaf = logits.detach().clone().requires_grad_()
        options: dict[str, Any] = {"beta": 0.0, "foreground_weight": 0.5, "backend": each_way}
        if together:
            losses = raw_cross_entropy(leaf, confidence, category, threshold, valid, ignore_band=bands, **options)
        else:
            calls = zip(confidence, category, threshold, bands, strict=True)
            losses = torch.stack([raw_cross_entropy(leaf, *c[:3], valid, ignore_band=c[3], **options) for c in calls])
        losses.sum().backward()
        results.append((losses.detach(), leaf.grad))
    assert results[0][0][0] != results[0][0][1]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_band_ignores_what_lies_between() -> None:
    logits, confidence, category, valid = one_target(2, 4, (3, 3), (8, 8))
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
    logits, confidence, category, valid = one_target(2, 6, (3, 4), (7, 9))
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
@pytest.mark.parametrize("written_for", ["reading", "a CPU"])
def test_gradcheck_of_the_logits(foreground_weight: float | None, written_for: str, on_cpu: str) -> None:
    backend = on_cpu if written_for == "a CPU" else "reference"
    logits, confidence, category, valid = one_target(2, 3, (2, 3), (5, 7))
    confidences, categories = torch.stack((confidence, 1 - confidence)), torch.stack((category, category))

    def losses(value: Tensor) -> Tensor:
        return raw_cross_entropy(
            value, confidences, categories, torch.tensor([0.3, 0.6]), valid, foreground_weight=foreground_weight,
            backend=backend,
        )  # fmt: skip

    torch.autograd.gradcheck(losses, logits.requires_grad_())


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(2, 6),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    threshold=st.floats(0.05, 0.95),
)
def test_equals_the_definition_for_every_shape(
    batch: int, channels: int, grid: tuple[int, int], size: tuple[int, int], threshold: float
) -> None:
    logits, confidence, category, valid = one_target(batch, channels, grid, size)
    loss = raw_cross_entropy(logits, confidence, category, threshold, valid)
    label = pseudo_label(confidence, category, threshold, valid, channels)
    weight = (label != 255) / perplexity(confidence, threshold)
    expected = (weight * upsampled_ce(logits, label)).sum() / weight.sum().clamp(min=1e-12)
    torch.testing.assert_close(loss, expected)


# --- both back-ends, and the kernels against the definition ---------------------------------------------------------


@pytest.mark.parametrize("options", [
    {},
    {"beta": 0.0, "foreground_weight": 0.5},
    {"alpha": 0.6, "beta": 1.7, "ignore_band": (0.25, 0.7)},
])  # fmt: skip
def test_sums_losses_and_gradient_follow_the_definition(kernel_device: torch.device, options: dict[str, Any]) -> None:
    given_case = case(5, (2, 3), (7, 16), device=kernel_device)
    compare(given_case, **options)
    parameters = [options.get("alpha", 0.8), options.get("beta", 1.0), options.get("ignore_band")]
    found = _forward(*given_case.tensors(), *parameters)[0]
    names = dict(zip(("alpha", "beta", "ignore_band"), parameters, strict=True))
    plain, truth = (
        reference.raw_cross_entropy(*values.tensors(), **names) for values in (given_case, given_case.double())
    )
    for index, name in enumerate(("Σ r·CE", "Σ r")):
        assert_three_way(found[..., index], plain[..., index], truth[..., index], 2e-6, name)


@pytest.mark.parametrize(("grid", "size"), [
    ((2, 2), (32, 32)),  # 16×
    ((1, 2), (14, 28)),  # 14×
    ((3, 2), (22, 13)),  # 7.33× and 6.5×
    ((3, 3), (3, 3)),  # 1×
    ((8, 7), (5, 3)),  # some regions have no pixel
    ((1, 1), (5, 4)),  # every weight is cut off
    ((1, 1), (1, 1)),
    ((2, 3), (1, 7)),
])  # fmt: skip
def test_any_ratio(kernel_device: torch.device, poisoned: None, grid: tuple[int, int], size: tuple[int, int]) -> None:
    compare(case(2, grid, size, targets=1, device=kernel_device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 20, 80])
def test_types_and_numbers_of_classes(kernel_device: torch.device, dtype: torch.dtype, classes: int) -> None:
    compare(case(classes, (1, 2), (5, 11), dtype=dtype, device=kernel_device), foreground_weight=0.5)


def test_1203_classes_in_several_turns(kernel_device: torch.device, poisoned: None) -> None:
    given_case = case(1203, (1, 1), (3, 4), targets=1, device=kernel_device)
    given_case.category[0, 0, 0] = torch.tensor([1203, 1204, -1, 1], dtype=torch.int16)
    given_case.confidence[0, 0, 0] = 0.9
    compare(given_case)


def test_three_targets_of_several_images_without_a_valid_mask(kernel_device: torch.device) -> None:
    compare(replace(case(3, (1, 2), (4, 9), batch=2, targets=3, device=kernel_device), valid=None))


def test_a_single_target_gives_a_scalar_for_a_float_or_tensor_threshold(
    kernel_device: torch.device, each_way: str
) -> None:
    given_case = case(3, (1, 2), (4, 9), targets=1, device=kernel_device)
    expected, _ = evaluate(replace(given_case, threshold=torch.tensor([0.37], device=kernel_device)), each_way)
    logits, confidence, category, _, valid = given_case.tensors()
    for threshold in (0.37, torch.tensor(0.37, dtype=torch.float64, device=kernel_device)):
        found = raw_cross_entropy(logits, confidence[0], category[0], threshold, valid, backend=each_way)
        assert found.shape == ()
        torch.testing.assert_close(found, expected[0])


# Exponentials that overflow are recognised and computed again; NumPy warns of them.
overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


# Logits of 1e4 are rounded to 1e-3, so probabilities are good to about that; the definition has the same error.
@overflows
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_logits_of_ten_thousand(kernel_device: torch.device, shift: float) -> None:
    given_case = case(4, (2, 2), (5, 7), device=kernel_device)
    logits = given_case.logits.sign() * 1e4 if shift == 0 else given_case.logits + shift
    compare(replace(given_case, logits=logits), tolerance=3e-3, foreground_weight=0.5)


@overflows
@pytest.mark.parametrize("lead", [30.0, 40.0, 90.0, 500.0])
def test_classes_far_above_the_background_stay_exact(kernel_device: torch.device, lead: float) -> None:
    """Both sides of the limit where the exponentials change their shift, in neighbouring cells of one tile."""
    given_case = case(3, (1, 2), (4, 8), device=kernel_device)
    logits = given_case.logits.clone()
    logits[:, 2, :, 1] += lead
    compare(replace(given_case, logits=logits))


@pytest.mark.parametrize("nothing", ["valid", "category", "band"])
def test_nothing_usable_gives_loss_and_gradient_zero(
    kernel_device: torch.device, each_way: str, poisoned: None, nothing: str
) -> None:
    given_case = case(2, (1, 2), (4, 6), device=kernel_device)
    if nothing == "valid":
        given_case = replace(given_case, valid=torch.zeros_like(given_case.valid))
    if nothing == "category":
        given_case = replace(given_case, category=torch.full_like(given_case.category, 255))
    band = (0.0, 1.0) if nothing == "band" else None
    given_case = replace(given_case, confidence=given_case.confidence.clamp(0.01, 0.99))
    for weight in (None, 0.5):
        losses, gradient = evaluate(given_case, each_way, foreground_weight=weight, ignore_band=band)
        assert losses.eq(0).all()
        assert gradient.eq(0).all()


def test_one_valid_pixel_is_its_cross_entropy(kernel_device: torch.device, each_way: str) -> None:
    given_case = case(2, (4, 4), (4, 4), targets=1, device=kernel_device)
    given_case.confidence[0, 0, 2, 1], given_case.category[0, 0, 2, 1] = 0.9, 2
    valid = torch.zeros(1, 4, 4, dtype=torch.bool, device=kernel_device)
    valid[0, 2, 1] = True
    losses, _ = evaluate(replace(given_case, valid=valid), each_way)
    torch.testing.assert_close(losses[0], -given_case.logits[0, :, 2, 1].log_softmax(0)[2])


def test_one_valid_pixel_reaches_its_four_cells_alone(kernel_device: torch.device, poisoned: None) -> None:
    given_case = case(2, (3, 4), (9, 12), device=kernel_device)
    valid = torch.zeros(1, 9, 12, dtype=torch.bool, device=kernel_device)
    valid[0, 3, 8] = True
    given_case.category[:, 0, 3, 8] = 1
    _, gradient = compare(replace(given_case, valid=valid))
    # Row 3 of 9 lies at 0.67 of 3 cells, column 8 of 12 at 2.33 of 4.
    assert gradient[0].ne(0).any(0).nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


def test_category_zero_is_background_and_beyond_the_classes_is_ignored(
    kernel_device: torch.device, each_way: str
) -> None:
    logits = torch.randn(1, 3, 1, 3, device=kernel_device)
    confidence = torch.tensor([[[0.9, 0.9, 0.1]]], device=kernel_device)
    category = torch.tensor([[[0, 3, 255]]], device=kernel_device)
    loss = raw_cross_entropy(logits, confidence, category, 0.5, backend=each_way)
    torch.testing.assert_close(loss, -logits[0, :, 0, 0].log_softmax(0)[0])


@pytest.mark.parametrize(("dtype", "values"), [
    (torch.uint8, [0, 1, 3, 4, 254, 255]),
    (torch.int8, [0, 3, 4, -1, -128, 127]),
    (torch.int64, [0, 3, 4, -1, 2**32 + 1, -(2**40)]),
])  # fmt: skip
def test_categories_out_of_range_are_ignored(
    kernel_device: torch.device, dtype: torch.dtype, values: list[int]
) -> None:
    given_case = case(3, (1, 2), (3, 6), targets=1, category=dtype, device=kernel_device)
    given_case.category[:] = torch.tensor(values, dtype=dtype, device=kernel_device)
    compare(given_case)


@pytest.mark.parametrize("outside", [-3.0, 1.0])
def test_threshold_tensors_outside_the_range_are_kept_inside(kernel_device: torch.device, outside: float) -> None:
    given_case = case(2, (1, 1), (3, 5), targets=1, device=kernel_device)
    given_case.confidence[0, 0, 0] = torch.tensor([0.0, 0.5, 1.0, 0.2, 0.8])
    threshold = torch.full((1,), outside, dtype=torch.float64, device=kernel_device)
    compare(replace(given_case, threshold=threshold))


def test_half_types_are_computed_in_float32(kernel_device: torch.device, each_way: str) -> None:
    half = case(3, (1, 2), (3, 8), dtype=torch.bfloat16, device=kernel_device)
    losses, gradient = evaluate(half, each_way)
    assert losses.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(losses, evaluate(replace(half, logits=half.logits.float()), each_way)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_confidences_decide_as_in_the_definition(kernel_device: torch.device, dtype: torch.dtype) -> None:
    given_case = case(3, (1, 2), (3, 8), targets=1, device=kernel_device)
    compare(replace(given_case, confidence=given_case.confidence.to(dtype)), ignore_band=(0.3, 0.5))


def test_the_configuration_of_gpus_tiles_large_ratios(
    kernel_device: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One class a turn; regions of more rows and columns than a tile."""
    monkeypatch.setattr(runtime, "architecture", lambda device: "sm_90")
    blocks = configuration("raw_cross_entropy_corners", 2, "sm_90").blocks
    size = (blocks["ROWS"] + 1, blocks["COLUMNS"] + 1)
    compare(case(1, (1, 1), size, targets=1, device=kernel_device))


def test_the_configuration_of_gpus_holds_several_regions_and_targets(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One class a turn, so that the labels of a tile are visited one by one."""
    monkeypatch.setattr(runtime, "architecture", lambda device: "sm_90")
    compare(case(2, (1, 3), (4, 24), device=kernel_device))


def test_layouts_are_read_in_place(kernel_device: torch.device, poisoned: None) -> None:
    logits, confidence, category, threshold, valid = case(3, (2, 2), (4, 6), device=kernel_device).tensors()
    parameters = (0.8, 1.0, None)
    gradient = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    sums, normaliser, weight = _forward(logits, confidence, category, threshold, valid, *parameters)
    expected = _backward(gradient, normaliser, weight, logits, category)
    plain = reference.raw_cross_entropy(logits, confidence, category, threshold, valid, **DEFAULTS)
    views = zip(*(layouts(value) for value in (logits, confidence, category, valid, gradient)), strict=True)
    for (name, a), (_, b), (_, c), (_, d), (_, e) in views:
        inputs = (a, b, c, threshold, d, *parameters)
        found = _forward(*inputs)
        assert torch.equal(found[0], sums), name
        assert torch.equal(_backward(e, found[1], found[2], a, c), expected), name
        torch.testing.assert_close(reference.raw_cross_entropy(a, b, c, threshold, d, **DEFAULTS), plain)
        out = torch.empty_like(a)
        assert_no_copies(lambda inputs=inputs: _run_forward(*inputs))
        assert_no_copies(lambda a=a, c=c, e=e, out=out: _run_gather(*_run_corners(e, normaliser, weight, a, c), out))


def test_repeated_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    given_case = case(4, (2, 2), (9, 7), device=kernel_device)
    assert_same(*(evaluate(given_case, "triton", foreground_weight=0.5) for _ in range(2)))


def test_offsets_beyond_two_to_the_31_elements(kernel_device: torch.device) -> None:
    """Only the pages that hold the few elements are ever touched."""
    near = case(2, (1, 2), (2, 4), dtype=torch.bfloat16, category=torch.uint8, device=kernel_device)
    near = replace(near, confidence=near.confidence.bfloat16())
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=kernel_device)
    logits = far.as_strided(near.logits.shape, (0, 2**30, 2, 1)).copy_(near.logits)
    confidence = far.as_strided(near.confidence.shape, (2**31, 0, 8, 2), 16).copy_(near.confidence)
    category = torch.empty(2**31 + 64, dtype=torch.uint8, device=kernel_device)
    category = category.as_strided(near.category.shape, (2**31, 0, 8, 2)).copy_(near.category)
    distant = replace(near, logits=logits, confidence=confidence, category=category)
    assert_same(evaluate(distant, "triton"), evaluate(near, "triton"))


def test_registration(kernel_device: torch.device) -> None:
    logits, *rest = case(2, (1, 1), (2, 3), targets=1, device=kernel_device).tensors()
    parameters = (0.8, 1.0, [0.3, 0.6])
    torch.library.opcheck(_forward, (logits.requires_grad_(), *rest, *parameters))
    logits = logits.detach()
    _, normaliser, weight = _forward(logits, *rest, *parameters)
    gradient = torch.ones(1, 2, 2, device=kernel_device)
    torch.library.opcheck(_backward, (gradient, normaliser, weight, logits, rest[1]))
    assert_fullgraph(lambda x: raw_cross_entropy(x, *rest, foreground_weight=0.5, backend="triton"), logits)


@settings(max_examples=4, deadline=None)
@given(
    classes=st.integers(1, 6),
    grid=st.tuples(st.integers(1, 2), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 20)),
    targets=st.integers(1, 2),
)
def test_any_shape(classes: int, grid: tuple[int, int], size: tuple[int, int], targets: int) -> None:
    compare(case(classes, grid, size, targets=targets, device=DEVICE))
