"""What is written for a CPU against the definitions: in bands of every height, and without large tensors."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import assert_same, assert_three_way
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosa_fast.kernels import contrastive_separation, cpu, fuse_cams, raw_cross_entropy
from cosa_fast.kernels.cpu import bands, choice

Call = Callable[[str, torch.dtype], tuple[Tensor, ...]]
XI = torch.tensor([0.3, 0.6])


def scene(classes: int, grid: int, size: int, batch: int = 2) -> dict[str, Any]:
    """Maps of both networks, labels, pseudo-labels of two layers, and a valid box with a hole."""
    generator = torch.Generator().manual_seed(classes + grid + size)
    pixels = (2, batch, size, size)
    valid = torch.zeros(batch, size, size, dtype=torch.bool)
    valid[:, size // 4 :, : size - size // 5] = True
    valid[0, size // 2, size // 2] = False
    labels = torch.zeros(batch, classes)
    labels[:, -2:] = 1
    return {
        "cams": [torch.randn(2 * batch, classes, side, side, generator=generator) for side in (grid, grid // 2 + 1)],
        "labels": labels,
        "logits": 3 * torch.randn(batch, classes + 1, grid, grid, generator=generator),
        "confidence": torch.rand(pixels, generator=generator),
        "category": torch.randint(0, classes + 2, pixels, generator=generator).short(),
        "valid": valid,
    }


def calls(values: dict[str, Any]) -> dict[str, Call]:
    """Each operator's results, and its gradient, by back-end and type."""
    confidence, category, valid = values["confidence"], values["category"], values["valid"]
    size = (valid.shape[1], valid.shape[2])

    def fused(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return fuse_cams([cam.to(dtype) for cam in values["cams"]], values["labels"], size, valid, backend=backend)[:1]

    def entropy(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaf = values["logits"].to(dtype).requires_grad_()
        losses = raw_cross_entropy(
            leaf, confidence.to(dtype), category, XI.to(dtype), valid, foreground_weight=0.5, backend=backend
        )
        return losses.detach(), torch.autograd.grad(losses @ losses.new_tensor([1.0, 0.7]), leaf)[0]

    def separation(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaf = values["cams"][0][: len(values["labels"])].to(dtype).requires_grad_()
        grid = leaf.shape[2]
        loss = contrastive_separation(
            leaf, category[0, :, :grid, :grid] % 3, confidence[0, :, :grid, :grid].to(dtype), 0.4, epsilon=1.5,
            vectors="probability", image_labels=values["labels"], backend=backend,
        )  # fmt: skip
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return {"fuse_cams": fused, "raw_cross_entropy": entropy, "contrastive_separation": separation}


OPERATORS = sorted(choice.FEW)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("elements", [1, 1000, 10**6])
def test_as_exact_as_the_definition_in_bands_of_any_height(
    operator: str, elements: int, on_cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time, some, all."""
    call = calls(scene(6, 7, 45))[operator]
    monkeypatch.setattr(bands, "CACHE_ELEMENTS", elements)
    found, again = call(on_cpu, torch.float32), call(on_cpu, torch.float32)
    assert_same(found, again)
    plain, truth = call("reference", torch.float32), call("reference", torch.float64)
    for actual, own, exact in zip(found, plain, truth, strict=True):
        assert_three_way(actual, own, exact, 2e-6, operator)
    for actual, exact in zip(call(on_cpu, torch.float64), truth, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    elements=st.integers(1, 300),
    lead=st.sampled_from([0.0, 70.0, 90.0, 600.0, 1e4]),
    seed=st.integers(0, 999),
)
def test_cross_entropy_for_every_shape_and_far_logits(
    grid: tuple[int, int], size: tuple[int, int], elements: int, lead: float, seed: int
) -> None:
    """With classes that lead far in some cells: on both sides of the distance that exponentials bear."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, *grid, generator=generator, dtype=torch.float64)
    logits = (logits + lead * (torch.rand(logits.shape, generator=generator) < 0.3)).requires_grad_()
    confidence = torch.rand(2, 2, *size, generator=generator, dtype=torch.float64)
    category = torch.randint(0, 6, confidence.shape, generator=generator)
    valid = torch.rand(2, *size, generator=generator) < 0.6
    results = []
    with (
        mock.patch.dict(choice.FEW, dict.fromkeys(choice.FEW, 0)),
        mock.patch.object(bands, "CACHE_ELEMENTS", elements),
    ):
        for backend in ("auto", "reference"):
            losses = raw_cross_entropy(logits, confidence, category, XI.double(), valid, backend=backend)
            results.append((losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = (
            value.untyped_storage().nbytes() // value.itemsize
            for value in tree_leaves(result)
            if isinstance(value, Tensor)
        )
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize(("operator", "limit"), [("raw_cross_entropy", 0.1), ("fuse_cams", 0.1)])
def test_nothing_of_all_classes_on_the_pixel_grid(
    operator: str, limit: float, on_cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor anything near it, forward or backward."""
    monkeypatch.setattr(bands, "CACHE_ELEMENTS", 2**12)
    values = scene(80, 6, 96)
    everything = values["logits"].shape[1] * values["valid"].numel()
    with _Largest() as made:
        calls(values)[operator](on_cpu, torch.float32)
    assert 0 < made.elements < limit * everything


def test_scores_are_made_in_tiles(on_cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "CACHE_ELEMENTS", 2**10)
    with _Largest() as made:
        calls(scene(3, 16, 20))["contrastive_separation"](on_cpu, torch.float32)
    assert 0 < made.elements <= 4 * 3 * 16**2  # the CAMs themselves


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which operators were served here."""
    names: list[str] = []
    for name in OPERATORS:
        own = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, name=name, own=own, **k: names.append(name) or own(*a, **k))
    return names


@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_serves_large_calls_here_and_small_ones_by_the_definition(
    operator: str, served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = calls(scene(3, 4, 12))[operator]
    plain = call("reference", torch.float32)
    assert_same(call("auto", torch.float32), plain)
    assert not served
    monkeypatch.setattr(choice, "FEW", dict.fromkeys(choice.FEW, 0))
    call("auto", torch.float32)
    assert served == [operator]
    assert_same(call("reference", torch.float32), plain)
    assert served == [operator]


def test_the_demo_is_small() -> None:
    """Its figures are those of the definitions."""
    count, classes, crop, grid, layers = 16, 5, 128, 16, 2
    assert count * (classes + 1) * crop**2 <= choice.FEW["raw_cross_entropy"]
    assert layers * count * crop**2 <= choice.FEW["fuse_cams"]
    assert count * grid**4 <= choice.FEW["contrastive_separation"]
