"""What every kernel file shares: Triton where it is installed, the choice of back-end, and the launch of a kernel.

A launch names all arguments of the kernel, so that it can be recorded instead of run: `bench` and the tests compile
exactly what would have run, for architectures that this machine does not have.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..validation import check_choice, fail
from .table import Configuration, configuration

BACKENDS = ("auto", "reference", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language

    tl: Any = triton.language
    triton_jit: Callable[[Any], Any] = triton.jit
    HAS_TRITON = True
else:  # platforms without Triton: the kernels can still be imported, and read, but not run

    class _NoTriton:
        @staticmethod
        def constexpr(value: Any) -> Any:
            """Constants of kernels are made at import."""
            return value

    tl = _NoTriton()
    HAS_TRITON = False

    def triton_jit(function: Any) -> Any:
        """The kernel's source, never called."""
        return function


@dataclass(frozen=True)
class Launch:
    """A kernel launch that was recorded: the kernel, its grid, every argument by name, and its configuration."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    configuration: Configuration


@dataclass
class _Recording:
    architecture: str
    launches: list[Launch]


_recording: _Recording | None = None


def use_triton(backend: str, tensor: Tensor) -> bool:
    """Whether the call runs Triton kernels; with "auto" where `tensor` is on CUDA and not float64. (The kernels compute
    in float32, the definitions keep float64.)

    Raises:
        ValueError: no such back-end, or Triton cannot run here.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        return HAS_TRITON and tensor.is_cuda and tensor.dtype != torch.float64
    if backend == "reference":
        return False
    if not HAS_TRITON:
        raise fail("backend", "'triton'", "'auto' or 'reference': the package triton is not installed")
    if not (tensor.is_cuda or INTERPRETED or _recording):
        raise fail("backend", f"'triton' for tensors on {tensor.device}", "CUDA tensors, or TRITON_INTERPRET=1")
    return True


def architecture(device: torch.device) -> str:
    """The row of the launch table that serves a device: "sm_90", "gfx942", ..."""
    if _recording is not None:
        return _recording.architecture
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def configure(kernel: str, size: int, device: torch.device) -> Configuration:
    """What the table has for `kernel` at `size` (classes, channels or elements) on a device."""
    return configuration(kernel, size, architecture(device))


def launch(kernel: Any, grid: tuple[int, ...], configuration: Configuration, **arguments: Any) -> None:
    """Launch `kernel` on `grid` with all its arguments by name; block sizes come from the configuration."""
    named = {**arguments, **configuration.blocks}
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, named, configuration))
        return
    device = next(value.device for value in _flat(named) if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**named, num_warps=configuration.num_warps, num_stages=configuration.num_stages)


@contextmanager
def record_launches(architecture: str) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, configured for an architecture; results of operators are undefined."""
    global _recording
    previous, _recording = _recording, _Recording(architecture, [])
    try:
        yield _recording.launches
    finally:
        _recording = previous


def scalar_on(device: torch.device, value: float | Tensor) -> Tensor:
    """A number as a tensor on the device, as kernels read thresholds and rates; tensors already there stay as they are.

    Filled on the device: no copy from the host, so that it can be captured in a CUDA graph.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, dtype=torch.float32, device=device)


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    """name0, name1, ... = strides of the tensor in elements."""
    return {f"{name}{axis}": stride for axis, stride in enumerate(tensor.stride())}


def four_axes(tensor: Tensor) -> Tensor:
    """The tensor seen with four axes. Copies only where it has more, with strides that cannot be merged."""
    tensor = tensor.flatten(0, -4) if tensor.ndim > 4 else tensor
    return tensor[(None,) * (4 - tensor.ndim)]


def ceil_div(number: int, divisor: int) -> int:
    """⌈number / divisor⌉."""
    return -(-number // divisor)


def _flat(named: dict[str, Any]) -> Iterator[Any]:
    for value in named.values():
        yield from value if isinstance(value, tuple) else (value,)
