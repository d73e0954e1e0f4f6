"""Checks that every operator's tests use: three-way accuracy, layouts, copies, registration."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosa_fast.kernels.launch.runtime import record_launches

# Where Hypothesis runs the kernels: its tests take no fixture of a device.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assert_three_way(actual: Tensor, plain: Tensor, truth: Tensor, tolerance: float, name: str = "result") -> None:
    """The kernel's error against float64 is at most that of plain PyTorch in the same type, plus a tolerance.

    `tolerance` is relative to the largest finite magnitude of the truth (float64).
    """
    if actual.dtype == torch.bfloat16 and not actual.is_cuda:
        tolerance += 2**-8  # the interpreter truncates where the hardware rounds
    assert actual.shape == truth.shape == plain.shape, f"{name}: shape {tuple(actual.shape)}"
    truth, actual, plain = (value.detach().double().cpu() for value in (truth, actual, plain))
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    scale = max(float(truth.abs().max()), 1e-30)
    error, allowed = float((actual - truth).abs().max()), float((plain - truth).abs().max()) + tolerance * scale
    assert error <= allowed, f"{name}: error {error:.3e}, plain PyTorch's + tolerance {allowed:.3e}, scale {scale:.3e}"


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other layouts: a slice of a larger tensor, channels_last or transposed strides, steps of 2."""
    larger = torch.zeros([n + 3 for n in tensor.shape], dtype=tensor.dtype, device=tensor.device)
    inner = larger[tuple(slice(1, n + 1) for n in tensor.shape)]
    inner.copy_(tensor)
    yield "sliced", inner
    order = list(range(tensor.ndim))
    moved = [order[0], *order[2:], order[1]] if tensor.ndim > 2 else order[::-1]
    inverse = [moved.index(axis) for axis in order]
    yield "channels_last", tensor.permute(moved).contiguous().permute(inverse)
    spread = torch.zeros([*tensor.shape[:-1], 2 * tensor.shape[-1]], dtype=tensor.dtype, device=tensor.device)
    spread[..., ::2] = tensor
    yield "stepped", spread[..., ::2]


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operators.append(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


def far_copy(tensor: Tensor, axis: int) -> Tensor:
    """The same values, those of an axis spread over more than 2^31 elements with a stride below 2^31; on a CPU only the
    touched pages exist."""
    strides = list(torch.empty(tensor.shape).stride())
    strides[axis] = 2**31 // (tensor.shape[axis] - 1) + 5
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    assert last > 2**31 > max(strides)
    far = torch.empty(last + 1, dtype=tensor.dtype, device=tensor.device).as_strided(tensor.shape, strides)
    return far.copy_(tensor)


def aten_operators(call: Callable[[], Any]) -> list[str]:
    """Names of the ATen operators that a launcher (not the operator around it) calls, besides views."""
    with _Record() as record:
        call()
    return record.operators


COPIES = {"clone", "contiguous", "copy_", "_to_copy", "item", "_local_scalar_dense", "cat", "stack", "index", "nonzero"}


def assert_no_copies(call: Callable[[], Any]) -> None:
    """A launcher neither copies its inputs nor reads a value back to the host."""
    with record_launches("sm_90"):  # the interpreter itself copies
        found = COPIES & set(aten_operators(call))
    assert not found, f"hidden copies or synchronisation: {sorted(found)}"


def assert_same(found: Any, expected: Any, name: str = "") -> None:
    """Bit-equal tensors of the same types."""
    for a, b in zip(_tensors(found), _tensors(expected), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def assert_fullgraph(function: Callable[..., Any], *arguments: Any) -> None:
    """torch.compile traces the function whole, and the traced one gives the same bits."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*arguments), function(*arguments))


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
