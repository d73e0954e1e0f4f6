"""Kernels for attention by name: which can run where, and which one a network gets that asks for none.

"sdpa" leaves the choice to torch's scaled_dot_product_attention; "cudnn", "flash" and "efficient" are its kernels, one
each. "packed", "varlen" and "xformers" (network/attention.py) also take images of several sizes in one pass.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosa_fast.network.attention import KERNELS as PACKED
from cosa_fast.network.attention import PackedAttention, pack

NAMED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# What "auto" tries, in this order (docs/performance.md has the reasons); on other devices torch chooses.
ORDERS = {
    "sm_80": ("flash", "efficient"),
    "sm_90": ("cudnn", "flash", "efficient"),
    "sm_100": ("cudnn", "flash", "efficient"),
    "gfx942": ("flash", "efficient"),
}
CUDNN = 91501  # 9.15.1: older ones may fail at numbers of tokens that are no multiple of 128
_MODULES = {"varlen": "torch.nn.attention.varlen", "xformers": "xformers.ops"}


def architecture(device: torch.device) -> str | None:
    """The device's row of ORDERS: the first of its generation for NVIDIA (an sm_86 counts as sm_80), its own name for
    AMD. None on a CPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return f"sm_{torch.cuda.get_device_capability(device)[0]}0"


def refusal(kind: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no network can attend by `kind` on this device in this type; None where nothing speaks against it."""
    on_gpu = device.type == "cuda"
    if kind in ("cudnn", "efficient", "varlen", "xformers") and not on_gpu:
        return f"needs a GPU, this run computes on {device.type}"
    if on_gpu and kind in ("cudnn", "flash", "varlen") and dtype == torch.float32:
        return "needs the fused engine with run.precision=bf16"
    if kind == "cudnn" and torch.version.hip is not None:
        return "is NVIDIA's"
    if kind == "cudnn" and (found := torch.backends.cudnn.version() or 0) < CUDNN:
        return f"needs cuDNN 9.15.1 or later, this torch has {_version(found)}"
    try:
        importlib.import_module(_MODULES.get(kind, "torch"))
    except ImportError as error:
        remedy = "torch>=2.10" if kind == "varlen" else '-c constraints.txt -e ".[xformers]"'
        return f"{_MODULES[kind]} cannot be imported ({error}); install {remedy}"
    return None


def _version(number: int) -> str:
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else "none"


class NamedAttention(nn.Module):
    """Mixed into a module that calls scaled_dot_product_attention: it runs one kernel, and fails where that cannot
    run. The kernel is an attribute, so that compiled blocks are compiled anew for another one."""

    backend: SDPBackend

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(self.backend):
            return super().forward(*args, **kwargs)


@cache
def _named(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Named{kind.__name__}", (NamedAttention, kind), {})


def attending(backbone: nn.Module) -> list[Any]:
    """The modules of a timm backbone that call scaled_dot_product_attention."""
    return [module for module in backbone.modules() if hasattr(module, "fused_attn")]


def use_attention(backbone: nn.Module, kind: str) -> str | None:
    """Let all attention in a backbone run the kernel `kind`, by the class of its modules alone: names of weights and
    everything else stay. Why not, where it has none that can; torch chooses then."""
    modules = attending(backbone)
    for module in modules:
        module.__class__ = _own_class(type(module))
    if kind == "sdpa":
        return None
    if not modules:
        return f"{type(backbone).__name__} has no attention that a kernel could be named for"
    if not all(module.fused_attn for module in modules):
        return "timm's own switch has turned fused attention off (TIMM_FUSED_ATTN)"
    if kind in PACKED:
        return pack(backbone, kind)
    for module in modules:
        module.__class__ = _named(type(module))  # type: ignore[arg-type]  # mypy takes classes for unhashable
        module.backend = NAMED[kind]
    return None


def _own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before `use_attention` gave it a kernel."""
    if issubclass(kind, NamedAttention):
        return kind.__mro__[2]
    return kind.__mro__[1] if kind is PackedAttention else kind


@contextmanager
def any_size() -> Iterator[None]:
    """For images of ever new sizes, without cuDNN's kernel: it would plan anew for each size, which costs more than
    the attention itself, and torch would keep every plan until the process ends."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
