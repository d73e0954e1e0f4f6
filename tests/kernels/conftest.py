"""Fixtures of the kernel tests."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cosa_fast.kernels.cpu import choice


def _poison(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both back-ends, for what both must do; Triton's needs the tensors on `kernel_device`."""
    return str(request.param)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """The back-end that runs what is written for a CPU, and that here however few its values are."""
    monkeypatch.setattr(choice, "FEW", dict.fromkeys(choice.FEW, 0))
    return "auto"


@pytest.fixture(params=["reference", "cpu", "triton"])
def each_way(request: pytest.FixtureRequest) -> str:
    """`backend`, for operators of which there is one written for a CPU, too."""
    return str(request.getfixturevalue("on_cpu") if request.param == "cpu" else request.param)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New buffers hold NaN, or the largest integer: an element that no kernel writes shows in the result."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        return _poison(empty(*args, **kwargs))

    def poisoned_empty_like(*args: Any, **kwargs: Any) -> Tensor:
        return _poison(empty_like(*args, **kwargs))

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(torch, "empty_like", poisoned_empty_like)
