"""The choice of back-end, the launch table, and a package that works without Triton."""

import os
import subprocess
import sys

import pytest
import torch

from cosa_fast.kernels import perplexity
from cosa_fast.kernels.launch.runtime import record_launches, use_triton
from cosa_fast.kernels.launch.table import TABLE, configuration, row

WITHOUT_TRITON = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch
from cosa_fast.kernels import perplexity
assert perplexity(torch.tensor([1.0]), 0.4).item() > 0
try:
    perplexity(torch.tensor([1.0]), 0.4, backend="triton")
except ValueError as error:
    print(error)
"""


def test_the_package_works_without_triton() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("backend: got 'triton', want 'auto' or 'reference': the package triton is not")


def test_triton_on_the_cpu_needs_the_interpreter() -> None:
    program = "import torch; from cosa_fast.kernels import perplexity; perplexity(torch.ones(1), 0.4, backend='triton')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert (
        "ValueError: backend: got 'triton' for tensors on cpu, want CUDA tensors, or TRITON_INTERPRET=1" in run.stderr
    )


def test_auto_is_the_reference_on_the_cpu() -> None:
    assert not use_triton("auto", torch.ones(1))


def test_recorded_launches_do_not_run() -> None:
    with record_launches("sm_90") as launches:
        perplexity(torch.rand(5000), 0.4, backend="triton")
    (launch,) = launches
    assert launch.kernel.__name__ == "_perplexity_kernel"
    assert launch.grid == (5,)
    assert launch.arguments["size"] == 5000


def test_rows_are_chosen_by_size_and_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "some", [row(32, "sm_80", BLOCK=1), row(32, BLOCK=2), row(on="interpreter", BLOCK=3)])
    assert configuration("some", 32, "sm_80").blocks == {"BLOCK": 1}
    assert configuration("some", 32, "sm_90").blocks == {"BLOCK": 2}
    assert configuration("some", 33, "interpreter").blocks == {"BLOCK": 3}
    with pytest.raises(KeyError, match="some: no launch configuration for size 33 on sm_90"):
        configuration("some", 33, "sm_90")
