"""Programs on the CPU's OpenCL runtime: real groups of threads, barriers and local memory, on torch's own memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from bench.compiled.spirv import LANES, Program
from cosa_fast.kernels.launch.runtime import Launch

_NUMBERS = {"i32": np.int32, "i64": np.int64, "fp32": np.float32, "u1": np.int8, "fp64": np.float64}


@cache
def _device() -> tuple[Any, Any]:
    """(context, queue) of the CPU."""
    import pyopencl as cl

    devices = [device for platform in cl.get_platforms() for device in platform.get_devices()]
    cpus = [device for device in devices if device.type & cl.device_type.CPU and "FPGA" not in device.platform.name]
    if not cpus:
        raise RuntimeError("OpenCL finds no CPU; OCL_ICD_VENDORS must name a folder with the runtime's .icd file")
    context = cl.Context(cpus[:1])
    return context, cl.CommandQueue(context)


class Built:
    """A program ready to run."""

    def __init__(self, program: Program) -> None:
        import pyopencl as cl

        self.program = program
        self._kernel = getattr(cl.Program(_device()[0], program.spirv).build(), program.name)

    def run(self, launch: Launch) -> None:
        """All programs of the launch, and wait for them."""
        import pyopencl as cl

        arguments = list(self._arguments(launch))
        if self.program.shared:
            arguments.append(cl.LocalMemory(self.program.shared))
        self._kernel.set_args(*arguments)
        grid = (*launch.grid, 1, 1)[:3]
        threads = LANES * self.program.warps
        shape = (grid[0] * threads, grid[1], grid[2])
        if all(shape):
            cl.enqueue_nd_range_kernel(_device()[1], self._kernel, shape, (threads, 1, 1)).wait()

    def _arguments(self, launch: Launch) -> Iterator[Any]:
        for name, kind in self.program.signature.items():
            yield from _flat(launch.arguments[name], kind)


def _flat(value: Any, kind: Any) -> Iterator[Any]:
    if isinstance(kind, tuple):
        for part, of_part in zip(value, kind, strict=True):
            yield from _flat(part, of_part)
    elif kind != "constexpr":
        yield _pointer(value) if isinstance(value, Tensor) else _NUMBERS[kind](value)


def _pointer(tensor: Tensor) -> Any:
    """The tensor's memory, where it lies."""
    import pyopencl as cl

    start = tensor.data_ptr()
    return cl.SVM(np.frombuffer((ctypes.c_byte * 1).from_address(start), np.int8)) if start else _nothing()


@cache
def _nothing() -> Any:
    import pyopencl as cl

    return cl.SVM(np.zeros(1, np.int8))
