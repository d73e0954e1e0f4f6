"""Programs on the CPU's OpenCL runtime: real groups of threads, barriers and local memory, on torch's own memory."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
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


class CompilerCrash(RuntimeError):
    """The runtime's own compiler died of a program."""


def _binary(spirv: bytes) -> bytes:
    """The machine code of a program, made in a process of its own, as that compiler crashes on some; kept beside the
    environment."""
    folder = Path(sys.prefix) / "opencl" / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / hashlib.sha256(spirv).hexdigest()
    made = source.with_suffix(".bin")
    if not made.exists():
        source.write_bytes(spirv)
        command = [sys.executable, "-c", _BUILD, str(source), str(made)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise CompilerCrash(f"OpenCL's compiler crashes on {source}")
    return made.read_bytes()


_BUILD = """
import os, sys
import pyopencl as cl
from bench.compiled.opencl import _device
source, made = sys.argv[1:]
context, _ = _device()
program = cl.Program(context, open(source, "rb").read()).build()
open(made + "~", "wb").write(program.get_info(cl.program_info.BINARIES)[0])
os.replace(made + "~", made)
"""


class Built:
    """A program ready to run."""

    def __init__(self, program: Program) -> None:
        import pyopencl as cl

        self.program = program
        context, _ = _device()
        built = cl.Program(context, context.devices, [_binary(program.spirv)]).build()
        self._kernel = getattr(built, program.name)

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
    return cl.SVM(np.ctypeslib.as_array((ctypes.c_byte * 1).from_address(start))) if start else _nothing()


@cache
def _nothing() -> Any:
    import pyopencl as cl

    return cl.SVM(np.zeros(1, np.int8))
