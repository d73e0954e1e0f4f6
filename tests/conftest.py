"""Where the kernels run: on CUDA where there is one, else interpreted, which must be said before Triton's import."""

import os

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tiny_run"]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time: the gate must not depend on luck. HYPOTHESIS_PROFILE=default searches anew.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """A device on which backend="triton" works: CUDA, or the CPU with interpreted kernels."""
    from cosa_fast.kernels.launch.runtime import INTERPRETED

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels are compiled in this process, not interpreted")
    return torch.device(request.param)
