"""What the kernel benchmark counts, and what it hands to the operators."""

import itertools
from typing import Any

import pytest
import torch

from bench.operators import cases
from bench.operators.cases import OPERATORS
from bench.operators.limits import Cost, Limits
from bench.operators.scene import Size
from cosa_fast.kernels import reference

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        # 2 · 32² elements: 2 bytes in, 4 out; backward 2 + 4 in, 2 out.
        ("perplexity", {"batch": 2, "resolution": 32}, {"forward": 12_288, "backward": 16_384, "both": 28_672}),
        # 3 · 2 · 2 logits of 4 bytes; 1024 pixels: two targets of 4 + 1 bytes, valid 1; backward: 48 bytes out besides.
        (
            "raw_cross_entropy",
            {"classes": 2, "batch": 1, "resolution": 32, "dtype": "fp32"},
            {"forward": 11_312, "backward": 11_360, "both": 22_672},
        ),
        # Three images with 1, 2, 3 classes, grids of 1, 2, 3: 2 · 6 · 14 · 2 = 336; labels 240; 3072 pixels · 6.
        ("fuse_cams", {"batch": 3, "resolution": 32}, {"forward": 336 + 240 + 18_432}),
    ],
)
def test_bytes_are_those_counted_by_hand(name: str, size: dict[str, Any], expected: dict[str, int]) -> None:
    problem = OPERATORS[name].problem(Size(**size), CPU, filled=False)
    assert {mode: cost.bytes for mode, cost in problem.costs.items()} == expected


def test_every_pixel_costs_an_exponential_a_channel() -> None:
    size = Size(classes=2, batch=1, resolution=32)
    problem = OPERATORS["raw_cross_entropy"].problem(size, CPU, filled=False)
    assert problem.forward.exps == 32 * 32 * (3 + 1 + 2)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_pairs_are_counted_from_the_contents(scope: str) -> None:
    """Against the masks of the definition, spelled out pair by pair."""
    size = Size(classes=3, batch=2, resolution=96, variant=scope if scope == "batch" else "")
    problem = OPERATORS["contrastive_separation"].problem(size, CPU)
    _, category, confidence, threshold, valid = problem.arguments
    label, usable = reference.pseudo_labels(confidence, category, threshold, valid, 3)
    selected = usable & (reference.perplexity(confidence, threshold) <= 1)
    points = [(int(image), int(label[image, y, x])) for image, y, x in selected.nonzero()]
    positive = negative = 0
    for first, second in itertools.permutations(points, 2):
        if scope == "batch" or first[0] == second[0]:
            positive += first[1] == second[1]
            negative += first[1] != second[1]
    assert positive > 0
    assert negative > 0
    assert problem.forward.exps == negative + 2 * positive
    assert problem.backward.exps == negative + positive


def test_the_contents_give_every_operator_something_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "PARAMETERS", 1000)
    for name, operator in OPERATORS.items():
        problem = operator.problem(Size(batch=3, resolution=96, dtype="fp32"), CPU)
        results = problem.function(*problem.arguments, **problem.keywords, backend="reference")
        if problem.backward is not None:
            (gradient,) = torch.autograd.grad(results.sum(), problem.inputs)
            assert torch.isfinite(gradient).all(), name
            assert (gradient != 0).any(), name
        elif results is not None:
            first = results if isinstance(results, torch.Tensor) else results[0]
            assert torch.isfinite(first).all(), name
            assert (first > 0).any(), name


def test_the_limit_is_that_of_the_scarcest() -> None:
    limits = Limits("test", bytes=1e9, exps=1e6, flops=1e12, replay_ms=0.003, next_launch_ms=0.001)
    assert limits.least(Cost(bytes=10**6, exps=10**4, flops=10**6)) == (pytest.approx(10.0), "exps")
    assert limits.least(Cost(bytes=10**8, exps=10**4)) == (pytest.approx(100.0), "bytes")
    assert limits.launching(3) == pytest.approx(0.005)
