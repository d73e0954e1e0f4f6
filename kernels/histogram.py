"""The confidence histogram (METHOD section 4): counts[k] = #{valid ν with clamp(⌊ν·bins⌋, 0, bins − 1) = k}.

Confidences (any shape) → (bins,) float32. It moves 4 + 1 bytes per float32 confidence with its mask and 4 per bin. A
fixed number of programs walks over the elements and counts BINS bins at a time on the chip, so that no atomic leaves
it; a second kernel adds the programs' counts. Integer sums: the result does not depend on any order. The grid follows
from the shapes, not from what the mask leaves: nothing is read back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .launch.runtime import ceil_div, configure, four_axes, launch, strides, tl, triton_jit, use_triton
from .validation import TensorChecks, fail

MAX_PROGRAMS = 256  # per tile of bins: two for each processor of a large GPU, and few partial counts to add


@triton_jit
def _count_kernel(
    confidence_ptr,  # (n0, n1, n2, n3) any float, any strides
    valid_ptr,  # (n0, n1, n2, n3) bool, any strides; None: all valid
    partial_ptr,  # (programs, bins) int32: counts of each program
    size,
    n1, n2, n3,
    confidence_stride0, confidence_stride1, confidence_stride2, confidence_stride3,
    valid_stride0, valid_stride1, valid_stride2, valid_stride3,
    bins,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first = tl.program_id(1) * BINS
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(program * BLOCK, size, programs * BLOCK):
        offset = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = offset < size
        i3, i2, i1, i0 = offset % n3, offset // n3 % n2, offset // n3 // n2 % n1, offset // n3 // n2 // n1
        at = i0 * confidence_stride0 + i1 * confidence_stride1 + i2 * confidence_stride2 + i3 * confidence_stride3
        confidence = tl.load(confidence_ptr + at, mask=inside, other=0.0).to(tl.float32)
        counted = inside
        if valid_ptr is not None:
            at = i0 * valid_stride0 + i1 * valid_stride1 + i2 * valid_stride2 + i3 * valid_stride3
            counted = counted & (tl.load(valid_ptr + at, mask=inside, other=0) != 0)
        # Cut off before the conversion, which is undefined for what no integer can hold; NaN goes to bin 0.
        scaled = confidence * bins
        scaled = tl.where(scaled > 0.0, tl.minimum(scaled, bins - 1.0), 0.0)
        index = scaled.to(tl.int32) - first
        counted = counted & (index >= 0) & (index < BINS)
        counts += tl.histogram(tl.where(counted, index, 0), BINS, mask=counted)
    column = first + tl.arange(0, BINS)
    tl.store(partial_ptr + program * bins + column, counts, mask=column < bins)


@triton_jit
def _add_kernel(
    partial_ptr,  # (programs, bins) int32
    out_ptr,  # (bins,) float32: counts
    programs,
    bins,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    counts = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * bins + column[None, :]
        inside = (row < programs)[:, None] & (column < bins)[None, :]
        counts += tl.sum(tl.load(partial_ptr + at, mask=inside, other=0), 0)
    tl.store(out_ptr + column, counts.to(tl.float32), mask=column < bins)


def _run(confidence: Tensor, valid: Tensor | None, out: Tensor) -> None:
    read, of_valid = four_axes(confidence), four_axes(confidence if valid is None else valid)
    bins = len(out)
    counting = configure("histogram", read.numel(), out.device)
    programs = min(ceil_div(read.numel(), counting.blocks["BLOCK"]), MAX_PROGRAMS)
    partial = torch.empty((programs, bins), dtype=torch.int32, device=out.device)
    launch(
        _count_kernel,
        (programs, ceil_div(bins, counting.blocks["BINS"])),
        counting,
        confidence_ptr=read,
        valid_ptr=None if valid is None else of_valid,
        partial_ptr=partial,
        size=read.numel(),
        **dict(zip(("n1", "n2", "n3"), read.shape[1:], strict=True)),
        **strides("confidence_stride", read),
        **strides("valid_stride", of_valid),
        bins=bins,
    )
    adding = configure("histogram_add", bins, out.device)
    grid = (ceil_div(bins, adding.blocks["COLUMNS"]),)
    launch(_add_kernel, grid, adding, partial_ptr=partial, out_ptr=out, programs=programs, bins=bins)


@torch.library.custom_op("cosa_fast::histogram", mutates_args=())
def _histogram(confidence: Tensor, valid: Tensor | None, bins: int) -> Tensor:
    out = torch.empty(bins, dtype=torch.float32, device=confidence.device)
    _run(confidence, valid, out)
    return out


@_histogram.register_fake
def _(confidence: Tensor, valid: Tensor | None, bins: int) -> Tensor:
    return torch.empty(bins, dtype=torch.float32, device=confidence.device)


def histogram(confidence: Tensor, valid: Tensor | None, bins: int = 256, *, backend: str = "auto") -> Tensor:
    """Histogram of the valid confidences over [0, 1]; additive over batches and ranks.

    Args:
        confidence: any shape, in [0, 1]; what lies outside goes to the outermost bins, NaN to the first.
        valid: bool of the same shape; None: all.
        bins: at least 2; bin k is [k/bins, (k+1)/bins), the last one includes 1.

    Returns:
        (bins,) float32 counts, exact up to 2^24.

    Raises:
        ValueError: wrong shape, dtype or device; bins not an integer ≥ 2.
    """
    axes = " ".join(f"n{axis}" for axis in range(getattr(confidence, "ndim", 0)))
    checks = TensorChecks()
    checks.check("confidence", confidence, axes)
    checks.check_optional("valid", valid, axes, "bool")
    if not isinstance(bins, int) or bins < 2:
        raise fail("bins", repr(bins), "an integer >= 2")
    if use_triton(backend, confidence):
        return _histogram(confidence.detach(), valid, bins)
    return reference.histogram(confidence, valid, bins)
