"""One pass of a ViT over images of several sizes (AN's scales): all tokens lie behind one another in one sequence, so
that projections, norms and MLPs work on one large matrix, and attention stays within each image.

Three kernels do that attention. "packed": scaled_dot_product_attention, once per size; on any device. "varlen": torch's
variable-length attention, "xformers": memory-efficient attention with a block-diagonal mask; one launch for all sizes,
on a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosa_fast.network import torchvision_compat  # noqa: F401  (must come before timm)

from timm.layers.attention import Attention  # isort: skip
from timm.models.vision_transformer import Block, VisionTransformer  # isort: skip

from cosa_fast.data_pipeline.batch import sent
from cosa_fast.errors import UserError


@dataclass(frozen=True)
class Segments:
    """Which tokens belong together: groups of (images, tokens per image), one behind the other. `starts`: (images + 1,)
    int32 on the device, where each image's tokens begin, and the end. `mask`: xformers' form of the same."""

    groups: tuple[tuple[int, int], ...]
    starts: Tensor
    mask: Any = None

    @property
    def longest(self) -> int:
        """Tokens of the largest image."""
        return max(length for _, length in self.groups)


# query, key, value (T, heads, d) -> (T, heads, d)
Kernel = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


def attend_by_group(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """One batched attention for each size of images."""
    mixed, start = [], 0
    for images, length in segments.groups:
        rows = slice(start, start + images * length)
        batch = (part[rows].unflatten(0, (images, length)).transpose(1, 2) for part in (query, key, value))
        mixed.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
        start = rows.stop
    return torch.cat(mixed)


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """torch's variable-length flash attention: half types, CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = segments.starts, segments.longest
    mixed = varlen_attn(query.contiguous(), key.contiguous(), value.contiguous(), starts, starts, longest, longest)
    assert isinstance(mixed, Tensor)
    return mixed


def attend_xformers(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """xformers' memory-efficient attention under a block-diagonal mask: CUDA."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=segments.mask)[0]


KERNELS: dict[str, Kernel] = {"packed": attend_by_group, "varlen": attend_varlen, "xformers": attend_xformers}


class PackedAttention(Attention):
    """timm's attention, which also takes Segments in place of a mask, for x (1, T, D).

    `pack` turns an Attention into one by its class alone: names of weights and everything else stay.
    """

    kernel: Kernel

    def forward(self, x: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(attn_mask, Segments):
            return super().forward(x, attn_mask, *args, **kwargs)
        query, key, value = self.qkv(x[0]).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = (norm(each).to(value.dtype) for norm, each in ((self.q_norm, query), (self.k_norm, key)))
        mixed = self.kernel(query, key, value, attn_mask).flatten(1)
        mixed = self.norm(mixed)
        gate = getattr(self, "gate", None)  # earlier versions of timm have none
        if gate is not None:
            mixed = mixed * gate(x[0]).sigmoid()
        return self.proj_drop(self.proj(mixed))[None]


def check_attention(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """UserError unless teacher.attention = `kind` can run here."""
    remedy = "set it to packed or sdpa"
    if kind in ("varlen", "xformers") and device.type != "cuda":
        raise UserError(f"teacher.attention={kind}: needs a GPU, this run computes on {device.type}; {remedy}")
    if kind == "varlen" and dtype == torch.float32:
        raise UserError(f"teacher.attention=varlen: needs the fused engine with run.precision=bf16; {remedy}")
    modules = {"varlen": "torch.nn.attention.varlen", "xformers": "xformers.ops"}
    try:
        __import__(modules.get(kind, "torch"))
    except ImportError as error:
        raise UserError(
            f"teacher.attention={kind}: {modules[kind]} cannot be imported ({error}); {remedy}, or install "
            'torch>=2.10 for varlen, -c constraints.txt -e ".[xformers]" for xformers'
        ) from error


def pack(backbone: nn.Module, kind: str) -> None:
    """Let `run_packed` run this backbone with the kernel `kind`. UserError if it is no ViT with plain blocks."""
    blocks = list(getattr(backbone, "blocks", []))
    usual = getattr(type(backbone), "forward_intermediates", None) is VisionTransformer.forward_intermediates
    if not usual or not all(type(block) is Block and isinstance(block.attn, Attention) for block in blocks):
        raise UserError(
            f"teacher.attention={kind}: needs a plain ViT (timm's VisionTransformer), {type(backbone).__name__} is "
            "none; set it to sdpa"
        )
    for block in blocks:
        block.attn.__class__ = PackedAttention
        block.attn.kernel = KERNELS[kind]


def segments_of(groups: tuple[tuple[int, int], ...], kind: str, device: torch.device) -> Segments:
    """Segments for groups of (images, tokens per image)."""
    lengths = [length for images, length in groups for _ in range(images)]
    starts = sent(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)
    if kind != "xformers":
        return Segments(groups, starts)
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return Segments(groups, starts, BlockDiagonalMask.from_seqlens(lengths, device=device))


def embed(backbone: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) → what the first block receives, (B, N, D)."""
    return backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(images))))


def run_packed(
    backbone: Any, embedded: Sequence[Tensor], segments: Segments, level: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Blocks and final norm over (B_i, N_i, D) tokens of several sizes. Per size: the normalised tokens, and those
    behind block `level`, both (B_i, N_i, D)."""
    tokens = torch.cat([each.flatten(0, 1) for each in embedded])[None]
    intermediate = tokens
    for index, block in enumerate(backbone.blocks):
        tokens = block(tokens, attn_mask=segments)
        if index == level:
            intermediate = tokens

    def unpacked(packed: Tensor) -> list[Tensor]:
        parts = packed[0].split([images * length for images, length in segments.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, segments.groups, strict=True)]

    return unpacked(backbone.norm(tokens)), unpacked(intermediate)
