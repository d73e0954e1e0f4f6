"""Where a run computes."""

import torch

from cosa_fast.errors import UserError
from cosa_fast.kernels.runtime import use_triton


def pick_device(name: str) -> torch.device:
    """The device that `run.device` means."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = cuda, but this torch sees no CUDA device; use run.device=auto or cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def check_backend(backend: str, device: torch.device) -> None:
    """Refuse, before anything is computed, a run.backend that cannot work on this device."""
    try:
        use_triton(backend, torch.empty(0, device=device))
    except ValueError as error:
        raise UserError(f"run.backend = {backend} on {device.type}: {error}; use run.backend=auto") from error
