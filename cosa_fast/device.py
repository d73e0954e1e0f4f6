"""Where a run computes."""

import torch

from cosa_fast.errors import UserError


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `run.device` means; of several GPUs that of the local rank."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = cuda, but this torch sees no CUDA device; use run.device=auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def compute_type(precision: str, device: torch.device) -> torch.dtype:
    """The type of run.precision = `precision`; "auto" is bfloat16 on a GPU whose matrix units have it, float32
    elsewhere."""
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
