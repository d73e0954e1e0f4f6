"""Cross entropy against the CAM pseudo-label, weighted by reliability (eq. 5): sums Σ r·CE and Σ r of T targets.

CE_t = lse − z[y_t] with z = the (B, K, h, w) logits upsampled to (H, W), lse = log Σ_k exp z_k, y_t the pseudo-label
and r_t = 1/P of target t. All targets share one softmax. With c[t, s] the gradient of the sum Σ r·CE of side s
(background, foreground) the backward is

    dL/dz[k] = Σ_t r_t·c[t, s_t]·(softmax_k − [k = y_t]),   dL/dlogits[cell] = Σ_pixels weight(pixel, cell)·dL/dz.

An axis of n cells upsampled to N pixels falls into n + 1 regions of pixels between the same two cells (the first and
the last lie outside the outermost cells). Over the common denominator 2N all positions are integers: pixel x belongs
to region q // 2N and its second cell has weight (q mod 2N) / 2N, where q = (2x + 1)·n + N.

What must move and be computed at T targets, per pixel (float32 confidence, uint8 category):

    forward   5·T + 1 bytes in, 4·T + 4 out (r of each target, and lse), K + 1 exponentials, T logarithms
    backward  5·T + 4 bytes in, K exponentials; B·K·h·w gradients out, four corner sums per region and class between

An SM takes 16 exponentials a clock, so eight issue slots may go by per exponential before anything else is the limit.
A program is one warp, and a lane owns one column of pixels between the same two rows of cells, all in registers. The
classes go by in a loop: a lane loads the four corners of a class once, mixes them across once, and mixes down with one
FMA per pixel. No class is padded, and no sum over classes or rows leaves its lane.

- Forward: the exponentials are shifted by the background's logit, which is known before the loop, so that one pass
  over the classes is enough. A sum so large that another class must lie far above the background makes the tile start
  again, with the maximum as the shift.
- Backward: probabilities from the stored lse. Rows are summed in registers, columns over the lanes of their region (16
  shuffles for 16 × 32 pixels and a class). A second kernel lets every cell gather its corner sums in fixed order. A
  tile holds few different labels: it looks at them only when the loop arrives at the next class that is among them.
- Tiles of padding, and in the backward tiles without a usable pixel, skip the classes.

This file is long because forward and backward share the regions, their interpolation and their tiling, and are hard to
check apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu, reference
from .launch.runtime import ceil_div, configure, launch, scalar_on, strides, tl, triton_jit, use_triton
from .launch.table import Configuration
from .perplexity import LOG2E, keep_inside, reliability
from .sums import Whole, balanced_loss
from .validation import (
    TensorChecks,
    check_category_type,
    check_number,
    check_pair,
    check_perplexity,
    check_threshold,
    fail,
)

UNUSED: Any = tl.constexpr(1e30)  # the normaliser of tiles that nothing uses: probabilities are 0 there
# The shift of the exponentials is the background's logit, and only where a sum exceeds this the largest: beyond,
# float32 would round the difference too coarsely, or overflow.
LARGEST_SUM: Any = tl.constexpr(2.0**48)


@triton_jit
def _region_start(region, cells, pixels):
    """The first pixel of a region of an axis; `pixels` from the last one on."""
    return tl.minimum(tl.maximum((2 * region - 1) * pixels + cells - 1, 0) // (2 * cells), pixels)


@triton_jit
def _region_of(pixel, cells, pixels):
    """The region of a pixel, at most `cells` for pixels of the axis."""
    return tl.minimum(((2 * pixel + 1) * cells + pixels) // (2 * pixels), cells)


@triton_jit
def _second_weight(pixel, region, cells, pixels):
    """Weight of the region's second cell: the only one of region 0, none in the last. cells·pixels below 2^30."""
    remainder = (2 * pixel + 1) * cells + pixels - 2 * pixels * region
    weight = remainder.to(tl.float32) * (0.5 / pixels)
    return tl.where(region == 0, 1.0, tl.where(region == cells, 0.0, weight))


@triton_jit
def _corner_pointers(logits_ptr, image, row_region, column_region, height, width, logits0, logits2, logits3):
    """Upper left, upper right, lower left and lower right of the pixels between two rows and two columns of cells."""
    upper_ptr = logits_ptr + image * logits0 + tl.maximum(row_region - 1, 0).to(tl.int64) * logits2
    lower_ptr = logits_ptr + image * logits0 + tl.minimum(row_region, height - 1).to(tl.int64) * logits2
    left = tl.maximum(column_region - 1, 0).to(tl.int64) * logits3
    right = tl.minimum(column_region, width - 1).to(tl.int64) * logits3
    return upper_ptr + left, upper_ptr + right, lower_ptr + left, lower_ptr + right


@triton_jit
def _upsampled(upper_left, upper_right, lower_left, lower_right, across, down, k, stride):
    """Logits of classes k at the pixels: four corners, mixed across, then down."""
    offset = k * stride
    left, right = tl.load(upper_left + offset).to(tl.float32), tl.load(upper_right + offset).to(tl.float32)
    upper = left + across * (right - left)
    left, right = tl.load(lower_left + offset).to(tl.float32), tl.load(lower_right + offset).to(tl.float32)
    lower = left + across * (right - left)
    return upper + down * (lower - upper)


@triton_jit
def _upsampled_block(
    upper_left, upper_right, lower_left, lower_right, across, down, start, classes, stride, CLASSES: tl.constexpr
):
    """The same for CLASSES classes from `start` on; −1e30 for those that do not exist."""
    if CLASSES == 1:
        z = _upsampled(upper_left, upper_right, lower_left, lower_right, across, down, tl.cast(start, tl.int64), stride)
    else:
        k = (start + tl.arange(0, CLASSES)).to(tl.int64)[:, None, None]
        nearest = tl.minimum(k, classes - 1)
        z = _upsampled(upper_left, upper_right, lower_left, lower_right, across, down, nearest, stride)
        z = tl.where(k < classes, z, -1e30)
    return z


@triton_jit
def _read_target(
    target, confidence_ptr, category_ptr, threshold_ptr, image, rows, columns, present, classes,
    confidence0, confidence1, confidence2, confidence3,
    category0, category1, category2, category3,
    bands_ptr, threshold0, alpha, beta,
    BANDED: tl.constexpr, UNIT: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Pseudo-labels, −1 where unusable, and reliabilities, 0 there, of a target: (1, rows, columns) each."""
    rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    at = target * confidence0 + image * confidence1 + rows * confidence2 + columns * confidence3
    confidence = tl.load(confidence_ptr + at, mask=present, other=0.0).to(tl.float32)
    at = target * category0 + image * category1 + rows * category2 + columns * category3
    category = tl.load(category_ptr + at, mask=present, other=0).to(tl.int64)
    threshold = keep_inside(tl.load(threshold_ptr + target * threshold0).to(tl.float32))
    above = confidence >= threshold
    usable = present & (category >= 0) & (category < classes)
    if BANDED:
        foreground = confidence >= tl.load(bands_ptr + 2 * target + 1)
        usable = usable & (foreground | (confidence <= tl.load(bands_ptr + 2 * target)))
    else:
        foreground = above
    label = tl.where(usable, tl.where(foreground, category.to(tl.int32), 0), -1)
    return label, tl.where(usable, reliability(confidence, above, threshold, alpha, beta, UNIT, PLAIN), 0.0)


@triton_jit
def _over_pixels(values):
    """Σ over all elements; the lanes come last."""
    return tl.sum(tl.sum(tl.sum(values, 0), 0), 0)


@triton_jit
def _largest(values):
    """The largest element; the lanes come last."""
    return tl.max(tl.max(tl.max(values, 0), 0), 0)


@triton_jit
def _smallest(values):
    """The smallest element; the lanes come last."""
    return tl.min(tl.min(tl.min(values, 0), 0), 0)


@triton_jit
def _over_lanes(values, BLOCK: tl.constexpr, REGIONS: tl.constexpr, SPAN: tl.constexpr):
    """(BLOCK, REGIONS·SPAN) columns → (BLOCK, REGIONS) sums over the columns of each region."""
    return tl.sum(tl.reshape(values, [BLOCK, REGIONS, SPAN]), 2)


@triton_jit
def _forward_kernel(
    logits_ptr,  # (B, K, h, w) any float, any strides
    confidence_ptr,  # (T, B, H, W) any float, any strides
    category_ptr,  # (T, B, H, W) any integer, any strides
    threshold_ptr,  # (T,) any float
    valid_ptr,  # (B, H, W) bool, any strides; or None: all
    bands_ptr,  # (T, 2) float32, low and high of each target; None unless BANDED
    sums_ptr,  # (T, 2, 2, programs) float32 out: Σ r·CE and Σ r of background and foreground of each program
    normaliser_ptr,  # (B, H, W) float32 out: log₂ Σ_k exp z_k; 1e30 in tiles of padding
    weight_ptr,  # (T, B, H, W) float32 out: r of foreground, −r of background, 0 where unusable
    classes, height, width, full_height, full_width,
    logits0, logits1, logits2, logits3,
    confidence0, confidence1, confidence2, confidence3,
    category0, category1, category2, category3,
    threshold0, valid0, valid1, valid2,
    alpha, beta,
    BANDED: tl.constexpr,
    UNIT: tl.constexpr,
    PLAIN: tl.constexpr,
    TARGETS: tl.constexpr,
    ROW_PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    image, row_tile = tl.program_id(2).to(tl.int64), tl.program_id(1)
    region, part = row_tile // ROW_PARTS, row_tile % ROW_PARTS
    rows = _region_start(region, height, full_height) + part * ROWS + tl.arange(0, ROWS)[None, :, None]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    columns = tl.max_contiguous(columns, [1, 1, 1])  # or wide loads would give a lane neighbouring columns
    inside = (rows < _region_start(region + 1, height, full_height)) & (columns < full_width)
    present = inside
    if valid_ptr is not None:
        at = image * valid0 + rows.to(tl.int64) * valid1 + columns.to(tl.int64) * valid2
        present = tl.load(valid_ptr + at, mask=inside, other=0) != 0

    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tl.num_programs(2)
    sums_ptr += (image * tl.num_programs(1) + row_tile) * tl.num_programs(0) + tl.program_id(0)
    pixels = tl.num_programs(2).to(tl.int64) * full_height * full_width
    pixel = (image * full_height + rows) * full_width + columns
    if _largest(present.to(tl.int32)) != 0:
        down = _second_weight(rows, region, height, full_height)
        column_region = _region_of(columns, width, full_width)
        across = _second_weight(columns, column_region, width, full_width)
        upper_left, upper_right, lower_left, lower_right = _corner_pointers(
            logits_ptr, image, region, column_region, height, width, logits0, logits2, logits3
        )

        background = tl.zeros([1, 1, 1], tl.int64)
        z = _upsampled(upper_left, upper_right, lower_left, lower_right, across, down, background, logits1)
        shift = z * LOG2E
        total = tl.zeros([1, ROWS, COLUMNS], tl.float32)
        for start in range(0, classes, CLASSES):
            z = _upsampled_block(
                upper_left, upper_right, lower_left, lower_right, across, down, start, classes, logits1, CLASSES
            )
            total += tl.sum(tl.exp2(z * LOG2E - shift), 0, keep_dims=True)
        if _largest(total) > LARGEST_SUM:
            shift = tl.full([1, ROWS, COLUMNS], -1e30, tl.float32)
            for start in range(0, classes, CLASSES):
                z = _upsampled_block(
                    upper_left, upper_right, lower_left, lower_right, across, down, start, classes, logits1, CLASSES
                )
                shift = tl.maximum(shift, tl.max(z, 0, keep_dims=True) * LOG2E)
            total = tl.zeros([1, ROWS, COLUMNS], tl.float32)
            for start in range(0, classes, CLASSES):
                z = _upsampled_block(
                    upper_left, upper_right, lower_left, lower_right, across, down, start, classes, logits1, CLASSES
                )
                total += tl.sum(tl.exp2(z * LOG2E - shift), 0, keep_dims=True)
        normaliser = shift + tl.log2(total)

        tl.store(normaliser_ptr + pixel, normaliser, mask=inside)
        for index in range(TARGETS):
            label, weight = _read_target(
                tl.cast(index, tl.int64), confidence_ptr, category_ptr, threshold_ptr,
                image, rows, columns, present, classes,
                confidence0, confidence1, confidence2, confidence3, category0, category1, category2, category3,
                bands_ptr, threshold0, alpha, beta, BANDED, UNIT, PLAIN,
            )  # fmt: skip
            k, foreground = tl.maximum(label, 0).to(tl.int64), label > 0
            z = _upsampled(upper_left, upper_right, lower_left, lower_right, across, down, k, logits1)
            loss = weight * (normaliser - z * LOG2E)
            tl.store(sums_ptr, _over_pixels(tl.where(foreground, 0.0, loss)) / LOG2E)
            tl.store(sums_ptr + programs, _over_pixels(tl.where(foreground, 0.0, weight)))
            tl.store(sums_ptr + 2 * programs, _over_pixels(tl.where(foreground, loss, 0.0)) / LOG2E)
            tl.store(sums_ptr + 3 * programs, _over_pixels(tl.where(foreground, weight, 0.0)))
            sums_ptr += 4 * programs
            tl.store(weight_ptr + pixel, tl.where(foreground, weight, -weight), mask=inside)
            weight_ptr += pixels
    else:
        for _ in range(4 * TARGETS):
            tl.store(sums_ptr, 0.0)
            sums_ptr += programs
        for _ in range(TARGETS):
            tl.store(weight_ptr + pixel, tl.zeros([1, ROWS, COLUMNS], tl.float32), mask=inside)
            weight_ptr += pixels
        tl.store(normaliser_ptr + pixel, tl.full([1, ROWS, COLUMNS], UNUSED, tl.float32), mask=inside)


@triton_jit
def _corners_kernel(
    logits_ptr,  # (B, K, h, w) any float, any strides
    category_ptr,  # (T, B, H, W) any integer, any strides
    weight_ptr,  # (T, B, H, W) float32: of the forward
    gradient_ptr,  # (T, 2, 2) any float, any strides: of the sums; its entries [..., 0] are c
    normaliser_ptr,  # (B, H, W) float32: of the forward
    corners_ptr,  # (B, row tiles, 4, K, column tiles) float32 out: sums for upper left, upper right, lower left, right
    classes, height, width, full_height, full_width, column_tiles,
    logits0, logits1, logits2, logits3,
    category0, category1, category2, category3,
    gradient0, gradient1, gradient2,
    TARGETS: tl.constexpr,
    TARGET_BLOCK: tl.constexpr,
    ROW_PARTS: tl.constexpr,
    COLUMN_PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    REGIONS: tl.constexpr = COLUMNS // SPAN
    image, row_tile = tl.program_id(2).to(tl.int64), tl.program_id(1)
    region, part = row_tile // ROW_PARTS, row_tile % ROW_PARTS
    rows = _region_start(region, height, full_height) + part * ROWS + tl.arange(0, ROWS)[None, :, None]
    lane = tl.arange(0, COLUMNS)[None, None, :]
    column_tile = tl.program_id(0) * REGIONS + lane // SPAN
    column_region = tl.minimum(column_tile // COLUMN_PARTS, width)
    columns = _region_start(column_region, width, full_width) + column_tile % COLUMN_PARTS * SPAN + lane % SPAN
    inside = (rows < _region_start(region + 1, height, full_height)) & (column_tile < column_tiles)
    inside = inside & (columns < _region_start(column_region + 1, width, full_width))

    target = tl.arange(0, TARGET_BLOCK).to(tl.int64)[:, None, None]
    pixels = tl.num_programs(2).to(tl.int64) * full_height * full_width
    pixel = (image * full_height + rows) * full_width + columns
    weight = tl.load(weight_ptr + target * pixels + pixel, mask=inside & (target < TARGETS), other=0.0)
    at = target * category0 + image * category1 + rows.to(tl.int64) * category2 + columns.to(tl.int64) * category3
    label = tl.load(category_ptr + at, mask=weight > 0, other=0).to(tl.int32)
    label = tl.where(weight < 0, 0, tl.where(weight > 0, label, classes))
    gradient_ptr += target * gradient0
    background = tl.load(gradient_ptr, mask=target < TARGETS, other=0.0).to(tl.float32)
    foreground = tl.load(gradient_ptr + gradient1, mask=target < TARGETS, other=0.0).to(tl.float32)
    weight = weight * tl.where(weight > 0, foreground, -background)
    following = _smallest(label)  # the next class that occurs

    region_lane = tl.arange(0, REGIONS)[None, :]
    stored_tile = tl.program_id(0) * REGIONS + region_lane
    corner = tl.cast(classes, tl.int64) * column_tiles
    corners_ptr += (image * tl.num_programs(1) + row_tile) * 4 * corner + stored_tile
    block = tl.arange(0, CLASSES)[:, None]
    if following < classes:
        down = _second_weight(rows, region, height, full_height)
        across = _second_weight(columns, column_region, width, full_width)
        upper_left, upper_right, lower_left, lower_right = _corner_pointers(
            logits_ptr, image, region, column_region, height, width, logits0, logits2, logits3
        )
        normaliser = tl.load(normaliser_ptr + pixel, mask=inside, other=UNUSED)
        lower_weight = tl.sum(weight, 0, keep_dims=True) * down
        upper_weight = tl.sum(weight, 0, keep_dims=True) * (1.0 - down)
        right_weight = tl.reshape(across, [1, COLUMNS])
        for start in range(0, classes, CLASSES):
            z = _upsampled_block(
                upper_left, upper_right, lower_left, lower_right, across, down, start, classes, logits1, CLASSES
            )
            probability = tl.exp2(z * LOG2E - normaliser)
            upper, lower = tl.sum(probability * upper_weight, 1), tl.sum(probability * lower_weight, 1)
            if following < start + CLASSES:
                k = start + tl.arange(0, CLASSES)[None, :, None, None]
                labelled = tl.sum(tl.where(label[:, None] == k, weight[:, None], 0.0), 0)
                upper -= tl.sum(labelled * (1.0 - down), 1)
                lower -= tl.sum(labelled * down, 1)
                following = _smallest(tl.where(label >= start + CLASSES, label, classes))
            mask = (start + block < classes) & (stored_tile < column_tiles)
            out_ptr = corners_ptr + (start + block).to(tl.int64) * column_tiles
            left_weight = 1.0 - right_weight
            tl.store(out_ptr, _over_lanes(upper * left_weight, CLASSES, REGIONS, SPAN), mask=mask)
            tl.store(out_ptr + corner, _over_lanes(upper * right_weight, CLASSES, REGIONS, SPAN), mask=mask)
            tl.store(out_ptr + 2 * corner, _over_lanes(lower * left_weight, CLASSES, REGIONS, SPAN), mask=mask)
            tl.store(out_ptr + 3 * corner, _over_lanes(lower * right_weight, CLASSES, REGIONS, SPAN), mask=mask)
    else:
        nothing = tl.zeros([CLASSES, REGIONS], tl.float32)
        for start in range(0, classes, CLASSES):
            mask = (start + block < classes) & (stored_tile < column_tiles)
            out_ptr = corners_ptr + (start + block).to(tl.int64) * column_tiles
            for index in tl.static_range(4):
                tl.store(out_ptr + index * corner, nothing, mask=mask)


@triton_jit
def _gather_kernel(
    corners_ptr,  # (B, row tiles, 4, K, column tiles) float32
    out_ptr,  # (B, K, h, w) dL/dlogits in their type, any strides
    size, classes, height, width, row_tiles, column_tiles,
    out0, out1, out2, out3,
    ROW_PARTS: tl.constexpr,
    COLUMN_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    j, i, k, image = (
        offset % width, offset // width % height, offset // width // height % classes,
        offset // width // height // classes,
    )  # fmt: skip
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(2 * ROW_PARTS):  # the cell is the lower one of region i and the upper one of region i + 1
        lower = 1 - row // ROW_PARTS
        at = ((image * row_tiles + i * ROW_PARTS + row) * 4 + 2 * lower) * classes
        for column in range(2 * COLUMN_PARTS):
            right = 1 - column // COLUMN_PARTS
            tile = j * COLUMN_PARTS + column
            total += tl.load(corners_ptr + (at + right * classes + k) * column_tiles + tile, mask=mask, other=0.0)
    at = image * out0 + k * out1 + i * out2 + j * out3
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


class _Axis(NamedTuple):
    """How the regions of an axis are tiled: `parts` tiles of `block` pixels each."""

    block: int
    parts: int
    tiles: int


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _tile(cells: int, pixels: int, largest: int) -> _Axis:
    span = ceil_div(pixels, cells)
    block = min(_power_of_2(span), largest)
    parts = ceil_div(span, block)
    return _Axis(block, parts, (cells + 1) * parts)


def _fitted(kernel: str, logits: Tensor, confidence: Tensor, targets: int = 1) -> tuple[Configuration, _Axis, _Axis]:
    """The kernel's configuration and the tiling of both axes.

    The table's blocks, with no more rows than a region has, no more classes than there are, and fewer rows where a
    program holds more than two targets in registers.
    """
    configuration = configure(kernel, logits.shape[1], logits.device)
    blocks = dict(configuration.blocks)
    blocks["ROWS"] = max(blocks["ROWS"] // max(_power_of_2(targets) // 2, 1), 1)
    rows = _tile(logits.shape[2], confidence.shape[2], blocks["ROWS"])
    columns = _tile(logits.shape[3], confidence.shape[3], blocks["COLUMNS"])
    blocks["ROWS"], blocks["CLASSES"] = rows.block, min(blocks["CLASSES"], _power_of_2(logits.shape[1]))
    return replace(configuration, block_items=tuple(blocks.items())), rows, columns


def _sizes(logits: Tensor, confidence: Tensor) -> dict[str, int]:
    names = ("classes", "height", "width", "full_height", "full_width")
    return dict(zip(names, (*logits.shape[1:], *confidence.shape[2:]), strict=True))


def _run_forward(
    logits: Tensor,
    confidence: Tensor,
    category: Tensor,
    threshold: Tensor,
    valid: Tensor | None,
    alpha: float,
    beta: float,
    ignore_band: Sequence[float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (T, 2, 2), normaliser and weight of the forward kernel. ignore_band: low, high of all targets, or of each in
    turn."""
    bands = None
    if ignore_band is not None:
        bounds = list(ignore_band) * (2 * len(confidence) // len(ignore_band))
        bands = torch.stack([scalar_on(logits.device, bound) for bound in bounds])
    normaliser = torch.empty(confidence.shape[1:], dtype=torch.float32, device=logits.device)
    weight = torch.empty(confidence.shape, dtype=torch.float32, device=logits.device)
    chosen, rows, _ = _fitted("raw_cross_entropy", logits, confidence)
    grid = (ceil_div(confidence.shape[3], chosen.blocks["COLUMNS"]), rows.tiles, len(logits))
    shape = (len(confidence), 2, 2, grid[0] * grid[1] * grid[2])
    sums = torch.empty(shape, dtype=torch.float32, device=logits.device)
    launch(
        _forward_kernel,
        grid,
        chosen,
        logits_ptr=logits,
        confidence_ptr=confidence,
        category_ptr=category,
        threshold_ptr=threshold,
        valid_ptr=valid,
        bands_ptr=bands,
        sums_ptr=sums,
        normaliser_ptr=normaliser,
        weight_ptr=weight,
        **_sizes(logits, confidence),
        **strides("logits", logits),
        **strides("confidence", confidence),
        **strides("category", category),
        **strides("threshold", threshold),
        **({f"valid{axis}": 0 for axis in range(3)} if valid is None else strides("valid", valid)),
        alpha=alpha,
        beta=beta,
        BANDED=ignore_band is not None,
        UNIT=beta == 0,
        PLAIN=beta == 1,
        TARGETS=len(confidence),
        ROW_PARTS=rows.parts,
    )
    return sums.sum(-1), normaliser, weight


def _run_corners(
    gradient: Tensor, normaliser: Tensor, weight: Tensor, logits: Tensor, category: Tensor
) -> tuple[Tensor, _Axis, _Axis]:
    """The corner sums of all tiles, and the tiling of both axes."""
    chosen, rows, columns = _fitted("raw_cross_entropy_corners", logits, weight, len(weight))
    shape = (len(logits), rows.tiles, 4, logits.shape[1], columns.tiles)
    corners = torch.empty(shape, dtype=torch.float32, device=logits.device)
    launch(
        _corners_kernel,
        (ceil_div(columns.tiles, chosen.blocks["COLUMNS"] // columns.block), rows.tiles, len(logits)),
        chosen,
        logits_ptr=logits,
        category_ptr=category,
        weight_ptr=weight,
        gradient_ptr=gradient,
        normaliser_ptr=normaliser,
        corners_ptr=corners,
        **_sizes(logits, weight),
        column_tiles=columns.tiles,
        **strides("logits", logits),
        **strides("category", category),
        **strides("gradient", gradient),
        TARGETS=len(weight),
        TARGET_BLOCK=_power_of_2(len(weight)),
        ROW_PARTS=rows.parts,
        COLUMN_PARTS=columns.parts,
        SPAN=columns.block,
    )
    return corners, rows, columns


def _run_gather(corners: Tensor, rows: _Axis, columns: _Axis, out: Tensor) -> None:
    chosen = configure("raw_cross_entropy_gather", out.shape[1], out.device)
    launch(
        _gather_kernel,
        (ceil_div(out.numel(), chosen.blocks["BLOCK"]),),
        chosen,
        corners_ptr=corners,
        out_ptr=out,
        size=out.numel(),
        **dict(zip(("classes", "height", "width"), out.shape[1:], strict=True)),
        row_tiles=rows.tiles,
        column_tiles=columns.tiles,
        **strides("out", out),
        ROW_PARTS=rows.parts,
        COLUMN_PARTS=columns.parts,
    )


_forward = torch.library.custom_op("cosa_fast::raw_cross_entropy", _run_forward, mutates_args=())


@torch.library.custom_op("cosa_fast::raw_cross_entropy_backward", mutates_args=())
def _backward(gradient: Tensor, normaliser: Tensor, weight: Tensor, logits: Tensor, category: Tensor) -> Tensor:
    out = torch.empty_like(logits)
    _run_gather(*_run_corners(gradient, normaliser, weight, logits, category), out)
    return out


@_forward.register_fake
def _(logits: Tensor, confidence: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.empty(confidence.shape, dtype=torch.float32, device=logits.device)
    return weight.new_empty(len(confidence), 2, 2), weight.new_empty(confidence.shape[1:]), weight


@_backward.register_fake
def _(gradient: Tensor, normaliser: Tensor, weight: Tensor, logits: Tensor, category: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, category = inputs[:3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], logits, category)


def _differentiate(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(gradient, *ctx.saved_tensors), *[None] * 7


_forward.register_autograd(_differentiate, setup_context=_save)


def raw_cross_entropy(
    logits: Tensor,
    confidence: Tensor,
    category: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None = None,
    *,
    alpha: float = 0.8,
    beta: float = 1.0,
    foreground_weight: float | None = None,
    ignore_band: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
    whole: Whole | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of the segmentation against the CAM pseudo-label, weighted by reliability (eq. 5): Σ r·CE / Σ r.

    The pseudo-label is the category where ν ≥ ξ and background below; r = 1/P. The sums run over the usable pixels of
    the whole batch.

    Args:
        logits: (B, K, h, w), bilinearly upsampled to (H, W) inside; the only differentiable input.
        confidence: (B, H, W) in [0, 1], or (T, B, H, W) for T targets on the same logits.
        category: integers of the same shape; 0 counts as background, values outside 0..C (255 among them) are ignored.
        threshold: ξ strictly inside (0, 1): float or 0-d tensor, or (T,) tensor for T targets.
        valid: (B, H, W) bool, the real pixels; None: all.
        alpha, beta: of the perplexity; beta = 0 gives every pixel reliability 1.
        foreground_weight: f in [0, 1] gives f·(Σ r·CE / Σ r over foreground) + (1 − f)·(the same over background).
            Where one of the two is empty it contributes 0 and the share of the other stays as it is.
        ignore_band: (low, high) replaces the pseudo-label by: the category where ν ≥ high, background where ν ≤ low,
            ignored between. The reliability is still taken at the threshold. For T targets also T such pairs.
        whole: for a batch that is computed in parts (by several processes, or in several calls): maps the normaliser of
            these images to that of the whole batch. The result is then these images' share of the batch's loss.

    Returns:
        () loss, or (T,) losses. Without a usable pixel: loss 0, gradient 0.

    Raises:
        ValueError: wrong shape, dtype or device; a parameter out of its range; uint8 categories for more than 254
            classes.
    """
    checks = TensorChecks()
    checks.check("logits", logits, "B K h w")
    several = isinstance(confidence, Tensor) and confidence.ndim == 4
    checks.check("confidence", confidence, "T B H W" if several else "B H W")
    checks.check("category", category, "T B H W" if several else "B H W", "integer")
    check_category_type(category, checks["K"] - 1)
    checks.check_optional("valid", valid, "B H W", "bool")
    check_threshold(threshold, ((), (checks["T"],)) if several else ((),))
    check_perplexity(alpha, beta)
    if foreground_weight is not None:
        check_number("foreground_weight", foreground_weight, 0, 1)
    if not several:
        confidence, category = confidence[None], category[None]
    bands = None if ignore_band is None else _bands(ignore_band, len(confidence))
    thresholds = scalar_on(confidence.device, threshold).expand(len(confidence))
    if use_triton(backend, logits):
        bounds = None if bands is None else [bound for band in bands for bound in band]
        sums, *_ = _forward(logits, confidence, category, thresholds, valid, float(alpha), float(beta), bounds)
    else:
        values = logits.shape[1] * confidence[0].numel()
        plain = cpu if cpu.pays("raw_cross_entropy", backend, logits, values) else reference
        sums = plain.raw_cross_entropy(
            logits, confidence, category, thresholds, valid, alpha=alpha, beta=beta, ignore_band=bands
        )
    losses = balanced_loss(sums, foreground_weight, whole)
    return losses if several else losses[0]


def _bands(given: Any, targets: int) -> list[tuple[float, float]]:
    """One (low, high) per target of one for all of them, or of as many as there are."""
    several = isinstance(given, (list, tuple)) and any(isinstance(each, (list, tuple)) for each in given)
    if not several:
        check_pair("ignore_band", given, 0, 1)
    elif len(given) != targets:
        raise fail("ignore_band", f"{len(given)} pairs", f"(low, high), or {targets} such pairs, one per target")
    for index, band in enumerate(given if several else ()):
        check_pair(f"ignore_band[{index}]", band, 0, 1)
    return [(float(low), float(high)) for low, high in (given if several else [given] * targets)]
