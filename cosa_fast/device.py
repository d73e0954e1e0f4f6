"""Where a run computes."""

import torch

from cosa_fast.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device that `run.device` means."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = cuda, but this torch sees no CUDA device; use run.device=auto or cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
