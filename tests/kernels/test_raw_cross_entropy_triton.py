"""The raw_cross_entropy kernels against float64 and the definition."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import assert_fullgraph, assert_no_copies, assert_three_way, layouts
from torch import Tensor

from cosa_fast.kernels import raw_cross_entropy, reference
from cosa_fast.kernels.launch import runtime
from cosa_fast.kernels.launch.table import configuration
from cosa_fast.kernels.raw_cross_entropy import _backward, _forward, _run_corners, _run_forward, _run_gather

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
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


def evaluate(given_case: Case, backend: str, **options: Any) -> Result:
    """Losses and the gradient of their weighted sum."""
    logits, *rest = given_case.tensors()
    logits = logits.detach().requires_grad_()
    losses = raw_cross_entropy(logits, *rest, backend=backend, **options)
    weights = torch.linspace(1, -0.5, len(losses), dtype=losses.dtype, device=losses.device)
    return losses.detach(), torch.autograd.grad((losses * weights).sum(), logits)[0]


def compare(given_case: Case, tolerance: float = 2e-6, **options: Any) -> Result:
    """Three-way check of losses and gradient; the kernels' results."""
    found, plain = (evaluate(given_case, backend, **options) for backend in ("triton", "reference"))
    truth = evaluate(given_case.double(), "reference", **options)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == given_case.logits.dtype
    for name, a, b, c in zip(("loss", "gradient"), found, plain, truth, strict=True):
        assert_three_way(a, b, c, tolerance, name)
    return found


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


def test_three_targets(kernel_device: torch.device) -> None:
    compare(case(3, (1, 2), (4, 9), targets=3, device=kernel_device))


def test_batches_and_a_missing_valid_mask(kernel_device: torch.device) -> None:
    compare(replace(case(3, (1, 2), (4, 9), batch=2, device=kernel_device), valid=None))


def test_a_single_target_gives_a_scalar(kernel_device: torch.device) -> None:
    logits, confidence, category, _, valid = case(3, (1, 2), (4, 9), targets=1, device=kernel_device).tensors()
    found, plain = (
        raw_cross_entropy(logits, confidence[0], category[0], 0.4, valid, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, plain)


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
def test_nothing_usable_gives_loss_and_gradient_zero(kernel_device: torch.device, poisoned: None, nothing: str) -> None:
    given_case = case(2, (1, 2), (4, 6), device=kernel_device)
    if nothing == "valid":
        given_case = replace(given_case, valid=torch.zeros_like(given_case.valid))
    if nothing == "category":
        given_case = replace(given_case, category=torch.full_like(given_case.category, 255))
    band = (0.0, 1.0) if nothing == "band" else None
    given_case = replace(given_case, confidence=given_case.confidence.clamp(0.01, 0.99))
    for weight in (None, 0.5):
        losses, gradient = evaluate(given_case, "triton", foreground_weight=weight, ignore_band=band)
        assert losses.eq(0).all()
        assert gradient.eq(0).all()


def test_one_valid_pixel_reaches_its_four_cells_alone(kernel_device: torch.device, poisoned: None) -> None:
    given_case = case(2, (3, 4), (9, 12), device=kernel_device)
    valid = torch.zeros(1, 9, 12, dtype=torch.bool, device=kernel_device)
    valid[0, 3, 8] = True
    given_case.category[:, 0, 3, 8] = 1
    _, gradient = compare(replace(given_case, valid=valid))
    # Row 3 of 9 lies at 0.67 of 3 cells, column 8 of 12 at 2.33 of 4.
    assert gradient[0].ne(0).any(0).nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


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


@pytest.mark.parametrize("outside", [-3.0, 0.0, 1.0, 8.0])
def test_threshold_tensors_outside_the_range_are_kept_inside(kernel_device: torch.device, outside: float) -> None:
    given_case = case(2, (1, 1), (3, 5), targets=1, device=kernel_device)
    given_case.confidence[0, 0, 0] = torch.tensor([0.0, 0.5, 1.0, 0.2, 0.8])
    threshold = torch.full((1,), outside, dtype=torch.float64, device=kernel_device)
    compare(replace(given_case, threshold=threshold))


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
    views = zip(*(layouts(value) for value in (logits, confidence, category, valid, gradient)), strict=True)
    for (name, a), (_, b), (_, c), (_, d), (_, e) in views:
        inputs = (a, b, c, threshold, d, *parameters)
        found = _forward(*inputs)
        assert torch.equal(found[0], sums), name
        assert torch.equal(_backward(e, found[1], found[2], a, c), expected), name
        out = torch.empty_like(a)
        assert_no_copies(lambda inputs=inputs: _run_forward(*inputs))
        assert_no_copies(lambda a=a, c=c, e=e, out=out: _run_gather(*_run_corners(e, normaliser, weight, a, c), out))


def test_repeated_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    given_case = case(4, (2, 2), (9, 7), device=kernel_device)
    first, second = (evaluate(given_case, "triton", foreground_weight=0.5) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


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
    for a, b in zip(evaluate(distant, "triton"), evaluate(near, "triton"), strict=True):
        assert torch.equal(a, b)


def test_registration(kernel_device: torch.device) -> None:
    logits, *rest = case(2, (1, 1), (2, 3), targets=1, device=kernel_device).tensors()
    parameters = (0.8, 1.0, [0.3, 0.6])
    torch.library.opcheck(_forward, (logits.requires_grad_(), *rest, *parameters))
    logits = logits.detach()
    _, normaliser, weight = _forward(logits, *rest, *parameters)
    gradient = torch.ones(1, 2, 2, device=kernel_device)
    torch.library.opcheck(_backward, (gradient, normaliser, weight, logits, rest[1]))
    assert_fullgraph(lambda x: raw_cross_entropy(x, *rest, foreground_weight=0.5, backend="triton"), logits)


@settings(max_examples=6, deadline=None)
@given(
    classes=st.integers(1, 6),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 7), st.integers(1, 20)),
    targets=st.integers(1, 2),
)
def test_any_shape(classes: int, grid: tuple[int, int], size: tuple[int, int], targets: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compare(case(classes, grid, size, targets=targets, device=device))
