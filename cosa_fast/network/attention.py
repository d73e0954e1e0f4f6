"""One pass of a ViT over images of several sizes (AN's scales): all tokens lie behind one another in one sequence, so
that projections, norms and MLPs work on one large matrix, and attention stays within each image.

Three kernels do that attention. "packed": scaled_dot_product_attention, once per size; on any device. "varlen": torch's
variable-length attention, "xformers": memory-efficient attention with a block-diagonal mask; one launch for all sizes,
on a GPU. All three also serve images of one size, as ON's are ("packed" is scaled_dot_product_attention then).
network/attention_backends.py has the kernels for one size at a time, and which of all can run where.
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


@dataclass(frozen=True)
class Segments:
    """Which tokens belong together: groups of (images, tokens per image), one behind the other. `starts`: (images + 1,)
    int32 on the device, where each image's tokens begin, and the end. `mask`: xformers' form of the same, which it does
    not need for images of one size."""

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
    """xformers' memory-efficient attention, of several sizes under a block-diagonal mask: CUDA."""
    from xformers.ops import memory_efficient_attention

    images = segments.groups[0] if segments.mask is None else (1, len(query))
    batch = (part.unflatten(0, images) for part in (query, key, value))
    return memory_efficient_attention(*batch, attn_bias=segments.mask).flatten(0, 1)


KERNELS: dict[str, Kernel] = {"packed": attend_by_group, "varlen": attend_varlen, "xformers": attend_xformers}


class PackedAttention(Attention):
    """timm's attention with another kernel: for x (B, N, D), and for x (1, T, D) with Segments in place of a mask.

    `pack` turns an Attention into one by its class alone: names of weights and everything else stay.
    """

    kernel: Kernel

    def forward(self, x: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(attn_mask, Segments):
            if attn_mask is not None or self.kernel is attend_by_group:
                return super().forward(x, attn_mask, *args, **kwargs)
            attn_mask = _one_size(x)
        query, key, value = self.qkv(x).flatten(0, 1).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = (norm(each).to(value.dtype) for norm, each in ((self.q_norm, query), (self.k_norm, key)))
        mixed = self.kernel(query, key, value, attn_mask).flatten(1)
        mixed = self.norm(mixed).unflatten(0, x.shape[:2])
        gate = getattr(self, "gate", None)  # earlier versions of timm have none
        if gate is not None:
            mixed = mixed * gate(x).sigmoid()
        return self.proj_drop(self.proj(mixed))


def _one_size(x: Tensor) -> Segments:
    """Those of tokens (B, N, D), made on the device."""
    images, length = x.shape[:2]
    starts = torch.arange(0, images * length + 1, length, dtype=torch.int32, device=x.device)
    return Segments(((images, length),), starts)


def pack(backbone: nn.Module, kind: str) -> str | None:
    """Let `run_packed` run this backbone with the kernel `kind`. Why not, where it is no ViT with plain blocks."""
    blocks = list(getattr(backbone, "blocks", []))
    usual = getattr(type(backbone), "forward_intermediates", None) is VisionTransformer.forward_intermediates
    if not usual or not all(type(block) is Block and type(block.attn) is Attention for block in blocks):
        return f"needs a plain ViT (timm's VisionTransformer), {type(backbone).__name__} is none"
    for block in blocks:
        block.attn.__class__ = PackedAttention
        block.attn.kernel = KERNELS[kind]
    return None


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
