"""What is installed, and which GPU there is. Standard library only: it runs before anything else can be imported."""

from __future__ import annotations

import importlib.util
from typing import Any

# timm and torchvision bring yaml and PIL along.
NEEDED = ("torch", "triton", "numpy", "timm", "yaml", "PIL")
# What one thing alone needs, and which one.
WANTED = {
    "sklearn": "baseline, and the usual method in losses",
    "tensorboard": "training",
    "pytest": "tests",
    "hypothesis": "tests",
    "xformers": "its attention",
    "nvidia.dali": "data",
}


def absent(names: Any) -> list[str]:
    """Those of these modules that cannot be found."""
    return [name for name in names if not _found(name)]


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent that is missing, or a module that only pretends to be one
        return False


def first_line(wanted: Any = tuple(WANTED)) -> str:
    """What is not installed, and what is left out for want of it."""
    missing = absent(wanted)
    if not missing:
        return "not installed: nothing that a part needs"
    return "not installed: " + ", ".join(f"{name} (left out: {WANTED[name]})" for name in missing)


def describe_gpu() -> dict[str, Any] | None:
    """The CUDA device, in words; None where torch sees none. To be called in a process of its own: it opens CUDA."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory / 2**20,
        "capability": f"sm_{properties.major}{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
