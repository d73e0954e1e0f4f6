"""pytest plugin: the kernels' own tests with compiled kernels, at the launch shapes that an H100 gets.

Loaded before Triton (`-p bench.compiled.plugin`). Tests believe that they run in the interpreter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import pytest
import triton

from bench.compiled.opencl import Built, CompilerCrash
from bench.compiled.spirv import compile_launch
from cosa_fast import kernels
from cosa_fast.files import write_json
from cosa_fast.kernels.launch import runtime
from cosa_fast.kernels.launch.offline import specialise
from cosa_fast.kernels.launch.table import Configuration

ARCHITECTURE = "sm_90"
_built: dict[Any, Built] = {}
_crashed: set[Any] = set()
_launches = 0


def _run(kernel: Any, *, grid: Any, warmup: bool, num_warps: int, num_stages: int, **arguments: Any) -> None:
    global _launches
    launch = runtime.Launch(kernel, grid, arguments, Configuration(num_warps, num_stages))
    key = (kernel, str(specialise(launch)), num_warps, num_stages)
    if key in _crashed:
        pytest.skip("OpenCL's compiler crashed")
    if key not in _built:
        try:
            _built[key] = Built(compile_launch(launch))
        except CompilerCrash as crash:
            _crashed.add(key)
            pytest.skip(str(crash))
    _built[key].run(launch)
    _launches += 1


def pytest_addoption(parser: Any) -> None:
    """Where what was compiled is told."""
    parser.addoption(
        "--compiled",
        type=Path,
        help="JSON: how many kernels, launches, barriers put in, crashes",
    )


def pytest_configure(config: Any) -> None:
    """Launches go to the CPU, configured for the GPU."""
    assert kernels.__all__
    triton.runtime.jit.JITFunction.run = _run
    runtime.INTERPRETED = True
    runtime.architecture = lambda device: ARCHITECTURE


def pytest_sessionfinish(session: Any) -> None:
    """Tell it."""
    if path := session.config.getoption("compiled"):
        added = sum(built.program.barriers for built in _built.values())
        write_json(path, {"kernels": len(_built), "launches": _launches, "barriers": added, "crashed": len(_crashed)})
