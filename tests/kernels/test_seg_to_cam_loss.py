"""seg_to_cam_loss against the whole definition on the full grid, and, kernel against definition, float64."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import (
    DEVICE,
    assert_fullgraph,
    assert_no_copies,
    assert_same,
    assert_three_way,
    far_copy,
    layouts,
)
from torch import Tensor

from cosa_fast.kernels import seg_to_cam_loss
from cosa_fast.kernels.seg_to_cam_loss import _backward, _forward, _run, _run_backward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# S'/τ is rounded to 24 bits: its error is 1e-7·|S'|·few/τ, which the softmax passes on to targets between 0 and 1.
SHARP = 1e-4  # tolerance at τ = 0.01
SMOOTH = 3e-6  # at τ ≥ 0.3


class Case(NamedTuple):
    """Arguments of seg_to_cam_loss."""

    cam: Tensor
    logits: list[Tensor]
    labels: Tensor
    size: tuple[int, int]
    valid: Tensor | None

    def to(self, dtype: torch.dtype) -> "Case":
        return self._replace(cam=self.cam.to(dtype), logits=[scale.to(dtype) for scale in self.logits])

    def run(self, backend: str = "triton", temperature: float = 0.3, relu: bool = False) -> tuple[Tensor, Tensor]:
        """Loss and gradient."""
        cam = self.cam.detach().requires_grad_()
        loss = seg_to_cam_loss(cam, *self[1:], temperature=temperature, relu=relu, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, cam)[0]


def case(
    device: torch.device | str,
    present: Sequence[Sequence[int]] = ((0, 2), (1,)),
    classes: int = 3,
    grid: tuple[int, int] = (3, 2),
    size: tuple[int, int] = (11, 9),
    scales: Sequence[tuple[int, int]] = ((3, 2), (2, 5)),
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    """Random CAM and logits; `present` lists the classes of every image; most pixels are valid."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(present)
    cam = (scale * torch.randn(batch, classes, *grid, generator=generator)).to(device)
    logits = [(scale * torch.randn(2 * batch, classes + 1, *shape, generator=generator)).to(device) for shape in scales]
    labels = torch.zeros(batch, classes, device=device)
    for image, found in enumerate(present):
        labels[image, list(found)] = 1
    valid = (torch.rand(batch, *size, generator=generator) < 0.95).to(device)
    return Case(cam, logits, labels, size, valid)


def assert_accurate(given_case: Case, tolerance: float, temperature: float = 0.3, relu: bool = False) -> None:
    found = given_case.run("triton", temperature, relu)
    plain = given_case.run("reference", temperature, relu)
    truth = given_case.to(torch.float64).run("reference", temperature, relu)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == given_case.cam.dtype
    for name, a, b, c in zip(("loss", "gradient"), found, plain, truth, strict=True):
        assert_three_way(a, b, c, tolerance, name)


def launch(given_case: Case, with_gradient: bool = True) -> None:
    """The launcher alone."""
    cam = given_case.cam
    gradient = torch.empty(cam.shape, device=cam.device) if with_gradient else None
    sums = torch.empty(2, device=cam.device)
    _run(cam, *given_case[1:], 1 / 0.3, False, sums, gradient)


def target_by_hand(
    logits: list[Tensor], labels: Tensor, size: tuple[int, int], grid: tuple[int, int], temperature: float
) -> Tensor:
    """Eq. 7 with every class on the full grid."""
    batch = len(labels)
    summed = torch.zeros(batch, logits[0].shape[1], *size, dtype=torch.float64)
    for scale in logits:
        up = F.interpolate(scale.double(), size=size, mode="bilinear", align_corners=False)
        summed += up[:batch] + up[batch:].flip(-1)
    keep = F.pad(labels > 0, (1, 0), value=True)[:, :, None, None]
    probability = (summed / temperature).masked_fill(~keep, -torch.inf).softmax(1)[:, 1:]
    return F.interpolate(probability, size=grid, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 20, 80])
def test_the_definition_is_that_of_the_full_resolution(classes: int, relu: bool) -> None:
    present = [[], [0, classes - 1], [classes // 2]]
    cam, logits, labels, size, _ = case("cpu", present, classes, (4, 3), (37, 50), [(4, 3), (2, 3), (5, 4)]).to(
        torch.float64
    )
    target = target_by_hand(logits, labels, size, (4, 3), 0.3)
    expected = F.binary_cross_entropy_with_logits(cam.relu() if relu else cam, target)
    loss = seg_to_cam_loss(cam, logits, labels, size, temperature=0.3, relu=relu)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 1000),
)
def test_valid_cells_alone_count_for_every_shape(
    batch: int, classes: int, grid: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    present = [(torch.rand(classes, generator=generator) < 0.4).nonzero().flatten().tolist() for _ in range(batch)]
    given_case = case("cpu", present, classes, grid, size, [grid, (2, 3)], seed=seed).to(torch.float64)
    cam, logits, labels, _, valid = given_case
    assert valid is not None
    target = target_by_hand(logits, labels, size, grid, 1.0)
    # A cell is valid where its target reads valid pixels only: invalid ones must have no influence on the reduction.
    invalid = F.interpolate((~valid).double()[:, None], size=grid, mode="bilinear", align_corners=False) > 1e-5
    terms = F.binary_cross_entropy_with_logits(cam, target, reduction="none").masked_fill(invalid, 0)
    expected = terms.sum() / max(int((~invalid).sum()) * classes, 1)
    loss, _ = given_case.run("reference", temperature=1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck_of_the_cam(relu: bool) -> None:
    cam, *rest = case("cpu").to(torch.float64)
    torch.autograd.gradcheck(
        lambda value: seg_to_cam_loss(value, *rest, temperature=0.5, relu=relu), cam.requires_grad_()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("relu", "temperature"), [(False, 0.01), (True, 1.0)])
def test_loss_and_gradient_are_as_exact_as_plain_pytorch(
    kernel_device: torch.device, dtype: torch.dtype, relu: bool, temperature: float
) -> None:
    assert_accurate(case(kernel_device).to(dtype), SHARP if temperature == 0.01 else SMOOTH, temperature, relu)


@pytest.mark.parametrize("classes", [1, 2, 20, 80, 1203])
def test_any_number_of_classes(kernel_device: torch.device, classes: int) -> None:
    assert_accurate(case(kernel_device, [[0, classes - 1]], classes), SMOOTH)


@pytest.mark.parametrize(
    ("grid", "size"),
    [((1, 1), (1, 1)), ((1, 1), (16, 16)), ((7, 5), (13, 11)), ((4, 4), (64, 64)), ((5, 3), (5, 3)), ((9, 7), (4, 3)),
     ((3, 3), (21, 9))],
)  # fmt: skip
def test_any_ratio_of_grids(kernel_device: torch.device, grid: tuple[int, int], size: tuple[int, int]) -> None:
    assert_accurate(case(kernel_device, [[1]], 2, grid, size, [(4, 3)]), SMOOTH)


@settings(max_examples=6, deadline=None)
@given(
    classes=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    maps=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    classes: int, grid: tuple[int, int], size: tuple[int, int], maps: tuple[int, int], seed: int
) -> None:
    present = [[seed % classes]]
    found, expected = (
        case(DEVICE, present, classes, grid, size, [maps], seed=seed).run(backend)
        for backend in ("triton", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_every_pixel_counts_without_a_mask(kernel_device: torch.device) -> None:
    given_case = case(kernel_device)._replace(valid=None)
    assert_accurate(given_case, SMOOTH)
    everything = given_case._replace(valid=torch.ones(2, 11, 9, dtype=torch.bool, device=kernel_device))
    assert torch.equal(everything.run()[0], given_case.run()[0])


def test_reads_exactly_four_pixels_of_a_sixteenfold_cell(kernel_device: torch.device, backend: str) -> None:
    given_case = case(kernel_device, [[0]], 1, (2, 2), (32, 32), [(2, 2)])
    valid = torch.zeros(1, 32, 32, dtype=torch.bool, device=kernel_device)
    read = torch.tensor([7, 8, 23, 24])
    valid[0, read[:, None], read] = True
    everything = given_case._replace(valid=None).run(backend)
    torch.testing.assert_close(given_case._replace(valid=valid).run(backend), everything)
    valid[0, 8, 23] = False  # belongs to the upper right cell
    gradient = given_case._replace(valid=valid).run(backend)[1].flatten()
    assert gradient.ne(0).tolist() == [True, False, True, True]
    torch.testing.assert_close(gradient[[0, 2, 3]] * 3, everything[1].flatten()[[0, 2, 3]] * 4)


def test_taps_without_weight_do_not_decide_validity(kernel_device: torch.device, backend: str) -> None:
    given_case = case(kernel_device, [[0]], 1, (3, 3), (9, 9), [(2, 2)])  # odd ratio: the middle pixel alone
    valid = torch.zeros(1, 9, 9, dtype=torch.bool, device=kernel_device)
    valid[:, 1::3, 1::3] = True
    torch.testing.assert_close(
        given_case._replace(valid=valid).run(backend), given_case._replace(valid=None).run(backend)
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("relu", [False, True])
def test_extreme_logits_stay_finite_and_exact(kernel_device: torch.device, relu: bool) -> None:
    given_case = case(kernel_device, scale=1.0)
    extreme = given_case._replace(
        cam=given_case.cam.sign() * 1e4, logits=[scale.sign() * 1e4 for scale in given_case.logits]
    )
    assert_accurate(extreme, SHARP, 0.3, relu)  # S'/τ = 1e5
    for temperature in (1e-30, 1e-40):
        loss, gradient = extreme.run("triton", temperature, relu)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_small_losses_of_confident_absent_classes_are_not_lost(kernel_device: torch.device) -> None:
    given_case = case(kernel_device, [[]], 2)
    for value in (-5.0, -15.0, -40.0):
        sure = given_case._replace(cam=torch.full_like(given_case.cam, value))
        loss, gradient = sure.run()
        expected = torch.tensor(value, dtype=torch.float64).exp().log1p()
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        assert float(gradient.sum()) == pytest.approx(float(torch.tensor(value).sigmoid()), rel=1e-5)


def test_image_without_a_class_has_target_zero(kernel_device: torch.device, backend: str) -> None:
    given_case = case(kernel_device, [[], [1]])._replace(valid=None)
    first = Case(given_case.cam[:1], [scale[::2] for scale in given_case.logits], given_case.labels[:1], (11, 9), None)
    torch.testing.assert_close(first.run(backend)[0], F.softplus(given_case.cam[:1]).mean())
    assert_accurate(given_case, SMOOTH)


def test_absent_classes_are_not_read(kernel_device: torch.device, backend: str) -> None:
    given_case = case(kernel_device, [[0, 2], [2]])
    expected = given_case.run(backend)
    for scale in given_case.logits:
        scale[:, 2] = torch.nan
    assert_same(given_case.run(backend), expected)


def test_nothing_valid_gives_loss_and_gradient_zero(kernel_device: torch.device, backend: str) -> None:
    given_case = case(kernel_device)
    nothing = torch.zeros(2, 11, 9, dtype=torch.bool, device=kernel_device)
    loss, gradient = given_case._replace(valid=nothing).run(backend)
    assert loss == 0
    assert gradient.eq(0).all()


def test_one_valid_cell_counts_alone_even_among_nan(kernel_device: torch.device) -> None:
    given_case = case(kernel_device, [[0, 2]], 3, (2, 2), (4, 4), [(2, 2)])
    valid = torch.zeros(1, 4, 4, dtype=torch.bool, device=kernel_device)
    valid[0, 2:, :2] = True
    alone = given_case._replace(valid=valid)
    assert_accurate(alone, SMOOTH)
    expected = alone.run()
    dirty = torch.full_like(given_case.cam, torch.nan)
    dirty[..., 1, 0] = given_case.cam[..., 1, 0]
    assert_same(alone._replace(cam=dirty).run(), expected)


def test_relu_floor_is_ln_2_without_gradient(kernel_device: torch.device, backend: str) -> None:
    given_case = case(kernel_device, [[]], 3)
    closed = given_case._replace(cam=-given_case.cam.abs())
    loss, gradient = closed.run(backend, relu=True)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6)
    assert gradient.eq(0).all()


def test_layouts_are_read_in_place(kernel_device: torch.device, poisoned: None) -> None:
    given_case = case(kernel_device, [[0, 2]])
    expected = given_case.run()
    views = (layouts(tensor) for tensor in (given_case.cam, given_case.labels, given_case.valid))
    for cam, labels, valid, *logits in zip(*views, *map(layouts, given_case.logits), strict=True):
        other = Case(cam[1], [scale[1] for scale in logits], labels[1], given_case.size, valid[1])
        assert_same(other.run(), expected, cam[0])
        torch.testing.assert_close(other.run("reference"), expected)
        assert_no_copies(lambda other=other: launch(other))
        assert_no_copies(lambda other=other: launch(other, with_gradient=False))


def test_backward_reads_any_gradient_of_the_sums_in_place(kernel_device: torch.device, poisoned: None) -> None:
    gradient = torch.randn(1, 3, 5, 5, device=kernel_device)
    scale = torch.tensor(-1.5, device=kernel_device).expand(2)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(_backward(scale, gradient, dtype), (gradient * -1.5).to(dtype))
    assert_no_copies(lambda: _run_backward(scale, gradient, torch.empty_like(gradient)))


@pytest.mark.parametrize("axis", range(4))
def test_far_elements_are_addressed(kernel_device: torch.device, axis: int) -> None:
    given_case = case(kernel_device, [[0, 2], [1], [2]], 3, (3, 3), (3, 3), [(3, 3)]).to(torch.bfloat16)
    assert given_case.valid is not None
    far = given_case._replace(
        cam=far_copy(given_case.cam, axis),
        logits=[far_copy(given_case.logits[0], axis)],
        valid=far_copy(given_case.valid, min(axis, 2)),
    )
    assert_same(far.run(), given_case.run())


def test_repeated_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    given_case = case(kernel_device, [[0, 2]], 3, (9, 7))
    assert_same(given_case.run(), given_case.run())


def test_no_gradient_is_computed_unless_the_cam_wants_one(kernel_device: torch.device) -> None:
    given_case = case(kernel_device, [[1]])
    arguments = (*given_case[:3], *given_case.size, given_case.valid, 1 / 0.3, False)
    sums, gradient = _forward(*arguments, True)
    alone, nothing = _forward(*arguments, False)
    assert torch.equal(alone, sums)
    assert nothing.shape == (0,)
    assert gradient.shape == given_case.cam.shape


def test_the_teacher_gets_no_gradient(kernel_device: torch.device, backend: str) -> None:
    given_case = case(kernel_device, [[1]])
    teacher = [scale.requires_grad_() for scale in given_case.logits]
    assert not seg_to_cam_loss(given_case.cam, teacher, *given_case[2:], backend=backend).requires_grad


def test_half_types_are_computed_in_float32(kernel_device: torch.device, backend: str) -> None:
    half = case(kernel_device).to(torch.bfloat16)
    loss, gradient = half.run(backend)
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(loss, half.to(torch.float32).run(backend)[0])


def test_sums_are_the_loss_of_several_ranks(kernel_device: torch.device) -> None:
    given_case = case(kernel_device)
    arguments = (given_case.cam, given_case.logits, given_case.labels, *given_case.size, given_case.valid)
    sums, _ = _forward(*arguments, 1 / 0.3, False, False)
    torch.testing.assert_close(sums[0] / sums[1], given_case.run()[0])
    assert float(sums[1]) % 3 == 0


def test_registration(kernel_device: torch.device) -> None:
    given_case = case(kernel_device, [[1]], 2, (2, 2), (4, 4), [(2, 2)])
    cam = given_case.cam.clone().requires_grad_()
    arguments = (given_case.logits, given_case.labels, *given_case.size, given_case.valid, 1 / 0.3, False)
    torch.library.opcheck(_forward, (cam, *arguments, True))
    torch.library.opcheck(_forward, (given_case.cam, *arguments, False))
    scale, gradient = torch.ones(2, device=kernel_device), torch.randn(1, 2, 2, 2, device=kernel_device)
    torch.library.opcheck(_backward, (scale, gradient, torch.float16))
    assert_fullgraph(lambda values: seg_to_cam_loss(values, *given_case[1:], backend="triton"), cam)
