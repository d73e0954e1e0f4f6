"""fuse_cams against a definition written class by class, and, kernel against definition, float64."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    aten_operators,
    far_copy,
    layouts,
)
from torch import Tensor

from cosa_fast.kernels import fuse_cams
from cosa_fast.kernels.fuse_cams import _forward, _outputs, _run
from cosa_fast.kernels.launch.runtime import record_launches

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Case(NamedTuple):
    """Arguments of fuse_cams."""

    cams: list[Tensor]
    labels: Tensor
    size: tuple[int, int]
    valid: Tensor | None

    def run(self, backend: str = "triton") -> tuple[Tensor, Tensor]:
        return fuse_cams(*self, backend=backend)

    def double(self) -> "Case":
        return self._replace(cams=[cam.double() for cam in self.cams])


def case(
    device: torch.device | str,
    present: Sequence[Sequence[int]] = ((0, 2), (1,)),
    classes: int = 3,
    grids: Sequence[tuple[int, int]] = ((3, 2), (2, 5)),
    size: tuple[int, int] = (2, 7),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random maps; `present` lists the classes of every image; four fifths of the pixels are valid."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(present)
    cams = [torch.randn(2 * batch, classes, *grid, generator=generator).to(device, dtype) for grid in grids]
    labels = torch.zeros(batch, classes, device=device)
    for image, found in enumerate(present):
        labels[image, list(found)] = 1
    valid = (torch.rand(batch, *size, generator=generator) < 0.8).to(device)
    return Case(cams, labels, size, valid)


def fused_by_hand(cams: Sequence[Tensor], image: int, category: int, size: tuple[int, int]) -> Tensor:
    """Σ_s relu(max(CAM_s, flipped back CAM_s)) of an image's class in float64: (H, W)."""
    total = torch.zeros(size, dtype=torch.float64, device=cams[0].device)
    for cam in cams:
        maps = cam[:, category : category + 1].double()
        up = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[:, 0]
        total += torch.maximum(up[image], up[len(cam) // 2 + image].flip(-1)).clamp(min=0)
    return total


def fuse_by_hand(given_case: Case) -> tuple[Tensor, Tensor]:
    """METHOD section 3 as it reads, every class upsampled, image by image, in float64."""
    cams, labels, size, valid = given_case
    assert valid is not None
    batch, classes = labels.shape
    confidence, category = torch.zeros(batch, *size, dtype=torch.float64), torch.zeros(batch, *size, dtype=torch.uint8)
    for b in range(batch):
        best = torch.full(size, -1.0, dtype=torch.float64)
        for c in range(classes):
            if labels[b, c] == 0 or not valid[b].any():
                continue
            total = fused_by_hand(cams, b, c, size)
            low, high = total[valid[b]].min(), total[valid[b]].max()
            score = (total - low) / (high - low + 1e-5)
            better = (score > best) & valid[b]
            best[better] = score[better]
            category[b][better] = c + 1
            confidence[b][better] = score[better]
    return confidence, category


@pytest.mark.parametrize("classes", [1, 2, 20, 80])
def test_the_definition_is_what_the_method_says_at_ragged_sizes(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    present = [(torch.rand(classes, generator=generator) < 0.4).nonzero().flatten().tolist() for _ in range(3)]
    given_case = case("cpu", present, classes, [(5, 4), (2, 3), (7, 6)], (17, 13))
    confidence, category = given_case.double().run("reference")
    expected, expected_category = fuse_by_hand(given_case)
    torch.testing.assert_close(confidence, expected, atol=1e-12, rtol=0)
    assert torch.equal(category, expected_category)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 1000),
)
def test_the_definition_holds_for_every_shape(
    batch: int, classes: int, grid: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    present = [(torch.rand(classes, generator=generator) < 0.4).nonzero().flatten().tolist() for _ in range(batch)]
    given_case = case("cpu", present, classes, [grid, (3, 2)], size, seed=seed)
    confidence, category = given_case.run("reference")
    assert confidence.dtype == torch.float32
    assert category.dtype == torch.uint8
    assert ((confidence >= 0) & (confidence <= 1)).all()
    exact, _ = given_case.double().run("reference")
    torch.testing.assert_close(exact, fuse_by_hand(given_case)[0], atol=1e-9, rtol=0)
    of_background = torch.cat((torch.ones(batch, 1), given_case.labels), 1)
    assert (of_background.gather(1, category.long().flatten(1)) > 0).all()


def assert_as_exact_as_plain_pytorch(given_case: Case, tolerance: float = 1e-6) -> None:
    """Confidence by the three-way test; the category's own confidence in float64 must be the largest of all."""
    (found, category), (plain, _), (truth, expected) = (
        given_case.run(),
        given_case.run("reference"),
        given_case.double().run("reference"),
    )
    assert found.dtype == torch.float32
    assert category.dtype == expected.dtype
    assert ((found >= 0) & (found <= 1)).all()
    assert_three_way(found, plain, truth, tolerance)
    assert torch.equal(category > 0, expected > 0)
    of_category = torch.zeros_like(truth)
    for c in given_case.labels.any(0).nonzero().flatten().tolist():
        alone = torch.zeros_like(given_case.labels)
        alone[:, c] = given_case.labels[:, c]
        confidence, _ = given_case.double()._replace(labels=alone).run("reference")
        of_category += confidence * (category == c + 1)
    torch.testing.assert_close(of_category, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_plain_pytorch_in_every_type(kernel_device: torch.device, dtype: torch.dtype) -> None:
    assert_as_exact_as_plain_pytorch(case(kernel_device, dtype=dtype))


@pytest.mark.parametrize(
    ("grids", "size"),
    [
        pytest.param([(1, 1)], (1, 1), id="one pixel of one"),
        pytest.param([(1, 1), (5, 3)], (5, 7), id="constant map, and a map of fewer columns"),
        pytest.param([(7, 6), (11, 2)], (3, 3), id="downsampling"),
        pytest.param([(4, 5)], (4, 5), id="same size"),
        pytest.param([(3, 2), (2, 3), (1, 4), (4, 1), (2, 2)], (3, 5), id="five scales"),
        pytest.param([(5, 11)], (9, 35), id="tiles on both axes"),
        pytest.param([(2, 5)], (9, 67), id="wide tiles"),
    ],
)
def test_shapes_and_ratios(kernel_device: torch.device, grids: list[tuple[int, int]], size: tuple[int, int]) -> None:
    assert_as_exact_as_plain_pytorch(case(kernel_device, ((0, 1),), 2, grids, size))


@pytest.mark.parametrize("classes", [1, 2, 20, 80])
def test_class_counts(kernel_device: torch.device, classes: int) -> None:
    present = ((0, classes - 1), (classes // 2,))
    assert_as_exact_as_plain_pytorch(case(kernel_device, present, classes, ((2, 3),), (3, 5)))


def test_of_1203_classes_only_the_present_two_are_read(kernel_device: torch.device, poisoned: None) -> None:
    given_case = case(kernel_device, ((300, 1202),), 1203, ((2, 3),), (3, 5))
    expected = given_case.run("reference")
    absent = (given_case.labels == 0).nonzero()[:, 1]
    given_case.cams[0][:, absent] = torch.nan
    found = given_case.run()
    assert found[1].dtype == torch.int16
    assert set(found[1].unique().tolist()) <= {0, 301, 1203}
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_large_and_tiny_maps_stay_in_range(kernel_device: torch.device, scale: float) -> None:
    given_case = case(kernel_device, ((0, 1),), 2)
    assert_as_exact_as_plain_pytorch(given_case._replace(cams=[cam * scale for cam in given_case.cams]))


def test_by_hand(kernel_device: torch.device, each_way: str) -> None:
    cam = torch.tensor([[[[-1.0, 1.0, 3.0]]], [[[5.0, 0.0, -2.0]]]], device=kernel_device)  # flipped back: -2, 0, 5
    one = torch.ones(1, 1, device=kernel_device)
    confidence, category = fuse_cams([cam], one, (1, 3), backend=each_way)
    expected = torch.tensor([[[0.0, 1.0, 5.0]]], device=kernel_device) / (5 + 1e-5)
    torch.testing.assert_close(confidence, expected)
    assert (category == 1).all()


@pytest.mark.parametrize("value", [7.3, -7.3])
def test_equal_maps_take_the_lowest_present_class(
    kernel_device: torch.device, each_way: str, value: float, poisoned: None
) -> None:
    given_case = case(kernel_device, ((1, 2), (2,)))
    constant = given_case._replace(cams=[torch.full_like(cam, value) for cam in given_case.cams], valid=None)
    confidence, category = constant.run(each_way)
    assert confidence.eq(0).all()
    assert category[0].eq(2).all()
    assert category[1].eq(3).all()
    for cam in given_case.cams:
        cam[:, 2] = cam[:, 1]
    assert given_case.run(each_way)[1][0].unique().tolist() in ([0, 2], [2])


def test_nothing_valid_no_class_and_one_valid_pixel_give_zero(
    kernel_device: torch.device, each_way: str, poisoned: None
) -> None:
    given_case = case(kernel_device, ((0, 1), (), (1, 2)))
    assert given_case.valid is not None
    given_case.valid[0] = False
    given_case.valid[2] = False
    given_case.valid[2, 1, 3] = True
    confidence, category = given_case.run(each_way)
    assert confidence.eq(0).all()
    assert category[:2].eq(0).all()
    assert category[2, 1, 3] == 2
    assert category.count_nonzero() == 1


def test_padding_enters_no_extreme(kernel_device: torch.device, each_way: str, poisoned: None) -> None:
    cam = torch.tensor([0.0, 1.0, 2.0, 100.0], device=kernel_device).view(1, 1, 1, 4)
    valid = torch.tensor([[[False, True, True, False]]], device=kernel_device)
    one = torch.ones(1, 1, device=kernel_device)
    confidence, category = fuse_cams([torch.cat((cam, cam.flip(-1)))], one, (1, 4), valid, backend=each_way)
    expected = torch.tensor([[[0.0, 0.0, 1 / (1 + 1e-5), 0.0]]], device=kernel_device)
    torch.testing.assert_close(confidence, expected, atol=1e-7, rtol=0)
    assert category.flatten().tolist() == [0, 1, 1, 0]


def test_absent_classes_do_not_matter_even_when_not_finite(kernel_device: torch.device, each_way: str) -> None:
    given_case = case(kernel_device, ((0, 2), ()))
    expected = given_case.run(each_way)
    for cam in given_case.cams:
        cam[:, 1] = torch.nan
    assert_same(given_case.run(each_way), expected)


def test_a_map_that_is_not_finite_is_not_hidden(kernel_device: torch.device) -> None:
    given_case = case(kernel_device, ((0, 2),))
    given_case.cams[0][0, 2, 0, 0] = torch.nan
    found, expected = given_case.run()[0], given_case.run("reference")[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any()


def test_half_types_are_computed_in_float32(kernel_device: torch.device, each_way: str) -> None:
    half = case(kernel_device, ((0, 2),), size=(2, 3), dtype=torch.bfloat16)
    assert_same(half.run(each_way), half._replace(cams=[cam.float() for cam in half.cams]).run(each_way))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
def test_labels_of_any_type_and_layout(kernel_device: torch.device, each_way: str, dtype: torch.dtype) -> None:
    given_case = case(kernel_device, ((0, 2),), size=(2, 3))
    labels = given_case.labels if dtype == torch.bool else given_case.labels * 2
    if dtype == torch.float16:
        labels = labels - (labels == 0).float()  # absent below 0
    labels = labels.to(dtype).T.contiguous().T
    assert_same(given_case._replace(labels=labels).run(each_way), given_case.run(each_way))


def test_layouts_are_read_in_place(kernel_device: torch.device, poisoned: None) -> None:
    given_case = case(kernel_device, ((0, 2),), size=(2, 5))
    assert given_case.valid is not None
    expected, plain = given_case.run(), given_case.run("reference")
    views = zip(*(layouts(tensor) for tensor in (*given_case.cams, given_case.valid)), strict=True)
    for named in views:
        cams, valid = [view for _, view in named[:-1]], named[-1][1]
        other = Case(cams, given_case.labels, given_case.size, valid)
        assert_same(other.run(), expected, named[0][0])
        assert_same(other.run("reference"), plain, named[0][0])
        outputs = _outputs(given_case.labels, *given_case.size)
        assert_no_copies(lambda cams=cams, valid=valid, outputs=outputs: _run(cams, given_case.labels, valid, *outputs))


def test_no_valid_mask_means_all_valid(kernel_device: torch.device, each_way: str) -> None:
    given_case = case(kernel_device, ((0, 2),))
    assert given_case.valid is not None
    everything = given_case._replace(valid=torch.ones_like(given_case.valid))
    assert_same(given_case._replace(valid=None).run(each_way), everything.run(each_way))


def test_extra_memory_is_a_few_integers_per_class(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, classes, size = 2, 80, (64, 96)
    arguments = ([torch.zeros(2 * batch, classes, 4, 6, device=kernel_device)], torch.zeros(batch, classes), None)
    outputs = _outputs(arguments[1].to(kernel_device), *size)
    allocated: list[int] = []

    def counting(function: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = function(*args, **kwargs)
            allocated.append(tensor.numel())
            return tensor

        return allocate

    def launch() -> None:
        _run(arguments[0], arguments[1].to(kernel_device), None, *outputs)

    with record_launches("sm_90"):
        operators = set(aten_operators(launch))
        for name in ("empty", "empty_like", "zeros"):
            monkeypatch.setattr(torch, name, counting(getattr(torch, name)))
        launch()
    assert operators <= {"empty", "zeros", "zero_", "fill_", "detach", "_to_copy"}  # all allocations were counted
    assert 0 < sum(allocated) <= batch * (3 * classes + 1)


def test_repeated_runs_give_the_same_bits(kernel_device: torch.device) -> None:
    given_case = case(kernel_device, ((0,),), 2, ((3, 3),), size=(9, 33))  # four programs share the extremes
    assert_same(given_case.run(), given_case.run())


def test_no_gradient_is_kept(kernel_device: torch.device, each_way: str) -> None:
    given_case = case(kernel_device, ((0,),), size=(2, 2))
    given_case.cams[0].requires_grad_()
    assert not any(output.requires_grad for output in given_case.run(each_way))


def test_registration(kernel_device: torch.device) -> None:
    given_case = case(kernel_device, ((1,),), grids=((2, 3), (1, 2)), size=(3, 3))
    torch.library.opcheck(_forward, (given_case.cams, given_case.labels, *given_case.size, given_case.valid))
    cams, labels, size, valid = given_case
    assert_fullgraph(lambda x, y: fuse_cams([x, y], labels, size, valid, backend="triton"), *cams)


@settings(max_examples=6, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=2),
    size=st.tuples(st.integers(1, 4), st.integers(1, 34)),
    category=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_any_shape(grids: list[tuple[int, int]], size: tuple[int, int], category: int, seed: int) -> None:
    given_case = case(DEVICE, [[category]], 3, grids, size, seed=seed)
    valid, found = given_case.valid, given_case.run()
    assert valid is not None
    fused = fused_by_hand(given_case.cams, 0, category, size)
    kept = fused[valid[0]] if valid.any() else fused.new_zeros(1)
    spread = kept.max() - kept.min() + 1e-5  # rounding errors of the maps are divided by it
    expected = ((fused - kept.min()) / spread).where(valid, 0)
    assert ((found[0] - expected).abs() <= 1e-6 + 1e-5 / spread).all()
    assert torch.equal(found[1], (category + 1) * valid.to(torch.uint8))


@pytest.mark.parametrize("axis", range(4))
def test_far_elements_are_addressed(kernel_device: torch.device, axis: int) -> None:
    given_case = case(kernel_device, ((1,), (2,)), 3, ((3, 3),), (3, 3), torch.bfloat16)
    assert_same(given_case._replace(cams=[far_copy(given_case.cams[0], axis)]).run(), given_case.run())


def test_far_pixels_of_the_mask_are_addressed(kernel_device: torch.device) -> None:
    given_case = case(kernel_device, ((1,),), 3, ((3, 3),), (3, 3))
    assert given_case.valid is not None
    assert_same(given_case._replace(valid=far_copy(given_case.valid, 1)).run(), given_case.run())
