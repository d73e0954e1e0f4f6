"""Contrastive separation over low-perplexity pixels (eqs. 9, 10).

Ω: usable pixels with P ≤ ε; label ŷ where ν ≥ ξ, background below. For i ∈ Ω with positives R⁺_i (same label) and
negatives R⁻_i (another), in the same image or in the batch, s_ij = f_i·f_j/τ, f = x/‖x‖ ("cosine") or x ("dot"):
ℓ_i = mean_p softplus(L_i − s_ip), L_i = logsumexp_n s_in; results are (Σ_i ℓ_i, |Ω|). Backward: with w_i = 1/|R⁺_i| and
A_i = w_i Σ_p σ(L_i − s_ip) = dℓ_i/dL_i,
    D_ij = dℓ_i/ds_ij = −w_i σ(L_i − s_ij) for a positive j, A_i exp(s_ij − L_i) for a negative one;
    dΣℓ/df_i = Σ_j (D_ij + D_ji) f_j / τ; dx = (df − (df·f) f)/‖x‖.

Three steps; S = B·h·w slots, W = C rounded up to 16, at least 32:
1. Selection: block counts, then a stable partition of each group (an image, or the batch): pixels of Ω in their order
   first, the others behind. Features are written there as (S, W) float32 rows, 0 outside Ω. Reads cam once.
2. Loss: a program holds a tile of anchors and walks over the group's |Ω| features twice, for L_i and for the terms
   that need L_i: no (N, N) tensor, 2·|Ω|² dot products of length W, 2·|Ω|² exps. Leaves L_i, w_i, A_i per slot.
3. Gradient: a tile of rows gathers D_ij + D_ji from those scalars of i and j, so nothing is added atomically: |Ω|² dot
   products, |Ω|² rank-one updates, 2·|Ω|² exps. Rows wider than a tile are split over programs, which all recompute s.
|Ω| stays on the device: grids are sized for full groups, and programs behind |Ω| leave at once. The features fit into
L2 (S·W·4 bytes: 1.6 MB for VOC at B = 16, h = w = 28), so the limit is float32 arithmetic, not bytes. Everything that a
program may read is defined: slots behind |Ω| hold zeros and label −1, and tiles that reach behind a group repeat its
last slot under a label that takes part in nothing; so the inner loops need almost no masks.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

from . import reference
from .launch.runtime import ceil_div, launch, run_best, scalar_on, strides, tl, triton_jit, use_triton
from .launch.table import Configuration
from .perplexity import distance, keep_inside
from .sums import Whole, mean_loss
from .triton_functions import log1p
from .validation import TensorChecks, check_choice, check_number, check_perplexity, check_threshold

LARGEST_LIMIT = 1e34  # stands for any larger bound of −log(α·d)
CHANNELS = 32  # of a tile of pixels that is read from, or written to, cam
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # features, labels, slots, counts, statistics


@triton_jit
def _selection(
    category_ptr, confidence_ptr, valid_ptr, threshold_ptr, pixel, inside, height, width, classes,
    category_stride0, category_stride1, category_stride2,
    confidence_stride0, confidence_stride1, confidence_stride2,
    valid_stride0, valid_stride1, valid_stride2,
    alpha, limit, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """(selected, label) of pixels counted through the batch; P ≤ ε is asked as −log(α·d) ≤ ε^(1/β)."""
    x, y, b = pixel % width, pixel // width % height, pixel // width // height
    at = b * category_stride0 + y * category_stride1 + x * category_stride2
    category = tl.load(category_ptr + at, mask=inside, other=0).to(tl.int64)
    at = b * confidence_stride0 + y * confidence_stride1 + x * confidence_stride2
    confidence = tl.load(confidence_ptr + at, mask=inside, other=0.0).to(tl.float32)
    threshold = keep_inside(tl.load(threshold_ptr).to(tl.float32))
    d = tl.minimum(tl.maximum(distance(confidence, threshold), 1e-4), 1.0)
    selected = inside & (category >= 0) & (category <= classes) & (-tl.log(alpha * d) <= limit)
    if HAS_VALID:
        at = b * valid_stride0 + y * valid_stride1 + x * valid_stride2
        selected = selected & (tl.load(valid_ptr + at, mask=inside, other=0) != 0)
    return selected, tl.where(confidence >= threshold, category, 0)


@triton_jit
def _rows(features_ptr, slots, columns, width, WHOLE: tl.constexpr):
    """(slots, columns) tile of the features; WHOLE: no column lies behind the width."""
    pointers = features_ptr + slots[:, None] * width + columns[None, :]
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=(columns < width)[None, :], other=0.0)


@triton_jit
def _scores(
    features_ptr, first_i, first_j, i, j, width, inverse_temperature,
    SINGLE: tl.constexpr, WHOLE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """s of a tile pair from its first columns, which the caller holds, and the others, if any (not SINGLE)."""
    scores = tl.dot(first_i, tl.trans(first_j), input_precision="ieee")
    if not SINGLE:
        for start in range(BLOCK_C, width, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            rows_i = _rows(features_ptr, i, columns, width, WHOLE)
            rows_j = _rows(features_ptr, j, columns, width, WHOLE)
            scores = tl.dot(rows_i, tl.trans(rows_j), scores, input_precision="ieee")
    return scores * inverse_temperature


@triton_jit
def _slope(margin, same, weight, pull):
    """D of an anchor: −w·σ(m) for a positive, A·exp(−m) for a negative, m = L − s (≥ 0 for negatives but rounding)."""
    small = tl.exp(-tl.abs(margin))
    attraction = -weight * tl.where(margin >= 0, 1.0, small) / (1.0 + small)
    return tl.where(same, attraction, pull * tl.where(margin >= 0, small, 1.0))


@triton_jit
def _count_kernel(
    category_ptr,  # (B, h, w) any integer, any strides
    confidence_ptr,  # (B, h, w) any float, any strides: ν
    valid_ptr,  # (B, h, w) bool, any strides; only read with HAS_VALID
    threshold_ptr,  # () any float: ξ
    block_counts_ptr,  # (groups, blocks) int32, written: pixels of Ω in a block
    capacity,
    height, width, classes,
    category_stride0, category_stride1, category_stride2,
    confidence_stride0, confidence_stride1, confidence_stride2,
    valid_stride0, valid_stride1, valid_stride2,
    alpha, limit,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    selected, _ = _selection(
        category_ptr, confidence_ptr, valid_ptr, threshold_ptr,
        group * capacity + offset, offset < capacity, height, width, classes,
        category_stride0, category_stride1, category_stride2,
        confidence_stride0, confidence_stride1, confidence_stride2,
        valid_stride0, valid_stride1, valid_stride2,
        alpha, limit, HAS_VALID,
    )  # fmt: skip
    tl.store(block_counts_ptr + group * tl.num_programs(0) + block, tl.sum(selected.to(tl.int32), 0))


@triton_jit
def _partition_kernel(
    cam_ptr,  # (B, C, h, w) any float, any strides
    category_ptr,  # (B, h, w) any integer, any strides
    confidence_ptr,  # (B, h, w) any float, any strides: ν
    valid_ptr,  # (B, h, w) bool, any strides; only read with HAS_VALID
    threshold_ptr,  # () any float: ξ
    block_counts_ptr,  # (groups, blocks) int32: pixels of Ω in a block
    features_ptr,  # (S, row_width) float32, written: f by slot, 0 outside Ω
    labels_ptr,  # (S,) int32, written: label by slot, −1 outside Ω
    slots_ptr,  # (S,) int32, written: slot by pixel, −1 outside Ω
    counts_ptr,  # (groups,) int32, written: pixels of Ω in a group
    statistics_ptr,  # (4, S) float32, its first row written: 1/‖x‖ by slot, 0 where x has no direction
    capacity,
    row_width,
    height, width, classes,
    cam_stride0, cam_stride1, cam_stride2, cam_stride3,
    category_stride0, category_stride1, category_stride2,
    confidence_stride0, confidence_stride1, confidence_stride2,
    valid_stride0, valid_stride1, valid_stride2,
    alpha, limit,
    zero_square,
    HAS_VALID: tl.constexpr,
    COSINE: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    inside = offset < capacity
    pixel = group * capacity + offset
    selected, label = _selection(
        category_ptr, confidence_ptr, valid_ptr, threshold_ptr, pixel, inside, height, width, classes,
        category_stride0, category_stride1, category_stride2,
        confidence_stride0, confidence_stride1, confidence_stride2,
        valid_stride0, valid_stride1, valid_stride2,
        alpha, limit, HAS_VALID,
    )  # fmt: skip
    others, blocks = tl.arange(0, SCAN), tl.num_programs(0)
    counts = tl.load(block_counts_ptr + group * blocks + others, mask=others < blocks, other=0)
    total = tl.sum(counts, 0)
    if block == 0:
        tl.store(counts_ptr + group, total)
    chosen = selected.to(tl.int32)
    rank = tl.sum(tl.where(others < block, counts, 0), 0) + tl.cumsum(chosen, 0) - chosen  # pixels of Ω before
    slot = group * capacity + tl.where(selected, rank, total + offset - rank)
    tl.store(slots_ptr + pixel, tl.where(selected, slot, -1).to(tl.int32), mask=inside)
    tl.store(labels_ptr + slot, tl.where(selected, label, -1).to(tl.int32), mask=inside)

    x, y, b = pixel % width, pixel // width % height, pixel // width // height
    at = b * cam_stride0 + y * cam_stride2 + x * cam_stride3
    channels = tl.arange(0, BLOCK_C).to(tl.int64)
    inverse_norm = selected.to(tl.float32)
    if COSINE:
        square = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, classes, BLOCK_C):
            channel = start + channels
            mask = selected[:, None] & (channel < classes)[None, :]
            values = tl.load(cam_ptr + at[:, None] + channel[None, :] * cam_stride1, mask=mask, other=0.0)
            values = values.to(tl.float32)
            square += tl.sum(values * values, 1)
        directed = square > zero_square
        inverse_norm = tl.where(directed, tl.rsqrt(tl.where(directed, square, 1.0)), 0.0)
    tl.store(statistics_ptr + slot, inverse_norm, mask=inside)
    for start in range(0, row_width, BLOCK_C):
        channel = start + channels
        mask = selected[:, None] & (channel < classes)[None, :]
        values = tl.load(cam_ptr + at[:, None] + channel[None, :] * cam_stride1, mask=mask, other=0.0)
        values = values.to(tl.float32) * inverse_norm[:, None]
        mask = inside[:, None] & (channel < row_width)[None, :]
        tl.store(features_ptr + slot[:, None] * row_width + channel[None, :], values, mask=mask)


@triton_jit
def _loss_kernel(
    features_ptr,  # (S, row_width) float32: f by slot
    labels_ptr,  # (S,) int32: label by slot
    counts_ptr,  # (groups,) int32: pixels of Ω in a group
    statistics_ptr,  # (4, S) float32, all but its first row written: L, w, A by slot; 0 outside Ω
    partial_ptr,  # (groups, tiles) float32, written: Σ ℓ of a tile of anchors
    capacity,
    size,
    row_width,
    inverse_temperature,
    SINGLE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(counts_ptr + group)
    base = group * capacity
    of_i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    i = base + tl.minimum(of_i, capacity - 1)
    label_i = tl.load(labels_ptr + i)
    reach = tl.where(tile * BLOCK_I < count, count, 0)  # nothing to walk over for a tile behind Ω
    columns = tl.arange(0, BLOCK_C)
    first_i = _rows(features_ptr, i, columns, row_width, WHOLE)

    top = tl.full((BLOCK_I,), -1e30, tl.float32)
    mass = tl.zeros((BLOCK_I,), tl.float32)
    equals = tl.zeros((BLOCK_I,), tl.int32)
    for start in range(0, reach, BLOCK_J):
        of_j = start + tl.arange(0, BLOCK_J)
        j = base + tl.minimum(of_j, capacity - 1)
        label_j = tl.load(labels_ptr + j)
        first_j = _rows(features_ptr, j, columns, row_width, WHOLE)
        scores = _scores(
            features_ptr, first_i, first_j, i, j, row_width, inverse_temperature, SINGLE, WHOLE, BLOCK_C
        )  # fmt: skip
        label_j = tl.where(of_j < count, label_j, -2)  # neither a positive
        scores += tl.where(of_j < count, 0.0, -2e30)[None, :]  # nor a negative: exp(−2e30 + 1e30) = 0
        same = label_i[:, None] == label_j[None, :]
        equals += tl.sum(same.to(tl.int32), 1)
        scores = tl.where(same, -2e30, scores)
        higher = tl.maximum(top, tl.max(scores, 1))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
        top = higher
    paired = (mass > 0) & (equals > 1) & (of_i < count)  # an anchor equals itself
    logsumexp = tl.where(paired, top + tl.log(tl.where(paired, mass, 1.0)), 0.0)
    weight = tl.where(paired, 1.0 / tl.maximum(equals - 1, 1).to(tl.float32), 0.0)

    loss = tl.zeros((BLOCK_I,), tl.float32)
    pull = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, reach, BLOCK_J):
        of_j = start + tl.arange(0, BLOCK_J)
        j = base + tl.minimum(of_j, capacity - 1)
        label_j = tl.load(labels_ptr + j)
        first_j = _rows(features_ptr, j, columns, row_width, WHOLE)
        scores = _scores(
            features_ptr, first_i, first_j, i, j, row_width, inverse_temperature, SINGLE, WHOLE, BLOCK_C
        )  # fmt: skip
        label_j = tl.where(of_j < count, label_j, -2)
        positive = (label_i[:, None] == label_j[None, :]) & (of_i[:, None] != of_j[None, :])
        margin = logsumexp[:, None] - scores
        small = tl.exp(-tl.abs(margin))
        loss += tl.sum(tl.where(positive, tl.maximum(margin, 0.0) + log1p(small), 0.0), 1)
        pull += tl.sum(tl.where(positive, tl.where(margin >= 0, 1.0, small) / (1.0 + small), 0.0), 1)
    within = of_i < capacity
    tl.store(statistics_ptr + size + i, logsumexp, mask=within)
    tl.store(statistics_ptr + 2 * size + i, weight, mask=within)
    tl.store(statistics_ptr + 3 * size + i, weight * pull, mask=within)
    tl.store(partial_ptr + group * tl.num_programs(0) + tile, tl.sum(weight * loss, 0))


@triton_jit
def _total_kernel(
    partial_ptr,  # (partials,) float32: Σ ℓ of a tile of anchors
    counts_ptr,  # (groups,) int32: pixels of Ω in a group
    sums_ptr,  # (2,) float32, written: Σ ℓ, |Ω|
    partials,
    groups,
    BLOCK: tl.constexpr,
):
    offset = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, partials, BLOCK):
        loss += tl.load(partial_ptr + start + offset, mask=start + offset < partials, other=0.0)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, groups, BLOCK):
        count += tl.load(counts_ptr + start + offset, mask=start + offset < groups, other=0)
    tl.store(sums_ptr, tl.sum(loss, 0))
    tl.store(sums_ptr + 1, tl.sum(count, 0).to(tl.float32))


@triton_jit
def _gradient_kernel(
    features_ptr,  # (S, row_width) float32: f by slot
    labels_ptr,  # (S,) int32: label by slot
    counts_ptr,  # (groups,) int32: pixels of Ω in a group
    statistics_ptr,  # (4, S) float32: 1/‖x‖, L, w, A by slot
    rows_ptr,  # (S, row_width) float32, written for slots of Ω: Σ_j (D_ij + D_ji) f_j
    capacity,
    size,
    row_width,
    inverse_temperature,
    SINGLE: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_G: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(counts_ptr + group)
    if tile * BLOCK_I < count:
        base = group * capacity
        of_i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        i = base + tl.minimum(of_i, capacity - 1)
        columns = tl.arange(0, BLOCK_C)
        written = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
        first_i = _rows(features_ptr, i, columns, row_width, WHOLE)
        label_i = tl.load(labels_ptr + i)
        logsumexp_i = tl.load(statistics_ptr + size + i)
        weight_i = tl.load(statistics_ptr + 2 * size + i)
        pull_i = tl.load(statistics_ptr + 3 * size + i)
        gathered = tl.zeros((BLOCK_I, BLOCK_G), tl.float32)
        for start in range(0, count, BLOCK_J):
            of_j = start + tl.arange(0, BLOCK_J)
            j = base + tl.minimum(of_j, capacity - 1)
            label_j = tl.load(labels_ptr + j)
            logsumexp_j = tl.load(statistics_ptr + size + j)
            weight_j = tl.load(statistics_ptr + 2 * size + j)
            pull_j = tl.load(statistics_ptr + 3 * size + j)
            first_j = _rows(features_ptr, j, columns, row_width, WHOLE)
            scores = _scores(
                features_ptr, first_i, first_j, i, j, row_width, inverse_temperature, SINGLE, WHOLE, BLOCK_C
            )  # fmt: skip
            label_j = tl.where(of_j < count, label_j, -2)  # not a positive
            scores += tl.where(of_j < count, 0.0, -2e30)[None, :]  # a negative of which nothing is felt: exp(−m) = 0
            same = label_i[:, None] == label_j[None, :]
            slope = _slope(logsumexp_i[:, None] - scores, same, weight_i[:, None], pull_i[:, None])
            slope += _slope(logsumexp_j[None, :] - scores, same, weight_j[None, :], pull_j[None, :])
            slope = tl.where(of_i[:, None] != of_j[None, :], slope, 0.0)
            values = first_j if SINGLE and BLOCK_G == BLOCK_C else _rows(features_ptr, j, written, row_width, WHOLE_G)
            gathered = tl.dot(slope, values, gathered, input_precision="ieee")
        mask = (of_i < count)[:, None] & (written < row_width)[None, :]
        tl.store(rows_ptr + i[:, None] * row_width + written[None, :], gathered, mask=mask)


@triton_jit
def _scatter_kernel(
    upstream_ptr,  # (2,) float32, any strides: gradient of the sums; its first entry is read
    features_ptr,  # (S, row_width) float32: f by slot
    slots_ptr,  # (S,) int32: slot by pixel, −1 outside Ω
    statistics_ptr,  # (4, S) float32: 1/‖x‖ by slot in its first row
    rows_ptr,  # (S, row_width) float32: Σ_j (D_ij + D_ji) f_j by slot
    gradient_ptr,  # (B, C, h, w) cam's type, any strides, written
    size,
    row_width,
    height, width, classes,
    gradient_stride0, gradient_stride1, gradient_stride2, gradient_stride3,
    inverse_temperature,
    COSINE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < size
    slot = tl.load(slots_ptr + pixel, mask=inside, other=-1).to(tl.int64)
    selected = slot >= 0
    scale = tl.load(upstream_ptr).to(tl.float32) * inverse_temperature
    scale = scale * tl.load(statistics_ptr + slot, mask=selected, other=0.0)
    channels = tl.arange(0, BLOCK_C).to(tl.int64)
    radial = tl.zeros((BLOCK,), tl.float32)  # df·f, the part along x that the normalisation takes away
    if COSINE:
        for start in range(0, row_width, BLOCK_C):
            at = slot[:, None] * row_width + (start + channels)[None, :]
            mask = selected[:, None] & (start + channels < row_width)[None, :]
            rows = tl.load(rows_ptr + at, mask=mask, other=0.0)
            radial += tl.sum(rows * tl.load(features_ptr + at, mask=mask, other=0.0), 1)
    x, y, b = pixel % width, pixel // width % height, pixel // width // height
    to = b * gradient_stride0 + y * gradient_stride2 + x * gradient_stride3
    for start in range(0, classes, BLOCK_C):
        channel = start + channels
        at = slot[:, None] * row_width + channel[None, :]
        mask = selected[:, None] & (channel < classes)[None, :]
        rows = tl.load(rows_ptr + at, mask=mask, other=0.0)
        if COSINE:
            rows -= radial[:, None] * tl.load(features_ptr + at, mask=mask, other=0.0)
        result = (rows * scale[:, None]).to(gradient_ptr.dtype.element_ty)
        mask = inside[:, None] & (channel < classes)[None, :]
        tl.store(gradient_ptr + to[:, None] + channel[None, :] * gradient_stride1, result, mask=mask)


def _buffers(cam: Tensor, per_image: bool) -> Saved:
    """What the forward leaves for the backward."""
    images, classes, height, width = cam.shape
    size, row_width = images * height * width, max(32, 16 * ceil_div(classes, 16))
    real: dict[str, Any] = {"dtype": torch.float32, "device": cam.device}
    index: dict[str, Any] = {"dtype": torch.int32, "device": cam.device}
    return (
        torch.empty((size, row_width), **real),
        torch.empty((size,), **index),
        torch.empty((size,), **index),
        torch.empty((images if per_image else 1,), **index),
        torch.empty((4, size), **real),
    )


def _select(
    cam: Tensor, category: Tensor, confidence: Tensor, threshold: Tensor, valid: Tensor | None, saved: Saved,
    limit: float, alpha: float, cosine: bool,
) -> None:  # fmt: skip
    features, labels, slots, counts, statistics = saved
    classes, height, width = cam.shape[1:]
    groups = len(counts)
    capacity = len(slots) // groups
    of_valid = category if valid is None else valid  # not read where there is none
    selection: dict[str, Any] = {
        "category_ptr": category, "confidence_ptr": confidence, "valid_ptr": of_valid, "threshold_ptr": threshold,
        "capacity": capacity, "height": height, "width": width, "classes": classes,
        **strides("category_stride", category), **strides("confidence_stride", confidence),
        **strides("valid_stride", of_valid), "alpha": alpha, "limit": limit, "HAS_VALID": valid is not None,
    }  # fmt: skip

    def run(configuration: Configuration) -> None:
        blocks = ceil_div(capacity, configuration.blocks["BLOCK"])
        grid = (blocks, groups)
        block_counts = torch.empty(grid[::-1], dtype=torch.int32, device=cam.device)
        launch(_count_kernel, grid, configuration, **selection, block_counts_ptr=block_counts)
        launch(
            _partition_kernel,
            grid,
            configuration,
            **selection,
            cam_ptr=cam,
            block_counts_ptr=block_counts,
            features_ptr=features,
            labels_ptr=labels,
            slots_ptr=slots,
            counts_ptr=counts,
            statistics_ptr=statistics,
            row_width=features.shape[1],
            **strides("cam_stride", cam),
            zero_square=reference.ZERO_NORM**2,
            COSINE=cosine,
            SCAN=1 << (blocks - 1).bit_length(),
            BLOCK_C=CHANNELS,
        )

    run_best("contrastive_separation_select", capacity, cam.device, run)


def _pairs(saved: Saved, temperature: float) -> dict[str, Any]:
    """The arguments of the two kernels that walk over pairs."""
    features, labels, slots, counts, statistics = saved
    return {
        "features_ptr": features, "labels_ptr": labels, "counts_ptr": counts, "statistics_ptr": statistics,
        "capacity": len(slots) // len(counts), "size": len(slots), "row_width": features.shape[1],
        "inverse_temperature": 1 / temperature,
    }  # fmt: skip


def _fit(row_width: int, block: int) -> dict[str, bool]:
    """Whether a feature row is one block of columns, and whether it is whole blocks."""
    return {"SINGLE": row_width <= block, "WHOLE": row_width % block == 0}


def _sum_losses(sums: Tensor, saved: Saved, temperature: float) -> None:
    arguments = _pairs(saved, temperature)
    row_width, groups = arguments["row_width"], len(saved[3])

    def run(configuration: Configuration) -> None:
        tiles = ceil_div(arguments["capacity"], configuration.blocks["BLOCK_I"])
        partial = torch.empty((groups, tiles), dtype=torch.float32, device=sums.device)
        launch(
            _loss_kernel,
            (tiles, groups),
            configuration,
            **arguments,
            **_fit(row_width, configuration.blocks["BLOCK_C"]),
            partial_ptr=partial,
        )
        _total(partial, saved[3], sums)

    run_best("contrastive_separation_loss", row_width, sums.device, run)


def _total(partial: Tensor, counts: Tensor, sums: Tensor) -> None:
    named = {"partial_ptr": partial, "counts_ptr": counts, "sums_ptr": sums}

    def run(configuration: Configuration) -> None:
        launch(_total_kernel, (1,), configuration, **named, partials=partial.numel(), groups=len(counts))

    run_best("contrastive_separation_total", partial.numel(), sums.device, run)


def _gather_gradient(rows: Tensor, saved: Saved, temperature: float) -> None:
    arguments = _pairs(saved, temperature)
    row_width, groups = arguments["row_width"], len(saved[3])

    def run(configuration: Configuration) -> None:
        blocks = configuration.blocks
        tiles, parts = ceil_div(arguments["capacity"], blocks["BLOCK_I"]), ceil_div(row_width, blocks["BLOCK_G"])
        launch(
            _gradient_kernel,
            (tiles, groups, parts),
            configuration,
            **arguments,
            **_fit(row_width, blocks["BLOCK_C"]),
            WHOLE_G=row_width % blocks["BLOCK_G"] == 0,
            rows_ptr=rows,
        )

    run_best("contrastive_separation_gradient", row_width, rows.device, run)


def _scatter(upstream: Tensor, rows: Tensor, saved: Saved, gradient: Tensor, temperature: float, cosine: bool) -> None:
    features, _, slots, _, statistics = saved
    classes, height, width = gradient.shape[1:]

    def run(configuration: Configuration) -> None:
        launch(
            _scatter_kernel,
            (ceil_div(len(slots), configuration.blocks["BLOCK"]),),
            configuration,
            upstream_ptr=upstream,
            features_ptr=features,
            slots_ptr=slots,
            statistics_ptr=statistics,
            rows_ptr=rows,
            gradient_ptr=gradient,
            size=len(slots),
            row_width=features.shape[1],
            height=height,
            width=width,
            classes=classes,
            **strides("gradient_stride", gradient),
            inverse_temperature=1 / temperature,
            COSINE=cosine,
            BLOCK_C=CHANNELS,
        )

    run_best("contrastive_separation_scatter", len(slots), gradient.device, run)


def _run_forward(
    cam: Tensor, category: Tensor, confidence: Tensor, threshold: Tensor, valid: Tensor | None,
    limit: float, temperature: float, alpha: float, per_image: bool, cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    saved = _buffers(cam, per_image)
    sums = torch.empty((2,), dtype=torch.float32, device=cam.device)
    _select(cam, category, confidence, threshold, valid, saved, limit, alpha, cosine)
    _sum_losses(sums, saved, temperature)
    return (sums, *saved)


def _run_backward(upstream: Tensor, cam: Tensor, saved: Saved, temperature: float, cosine: bool) -> Tensor:
    gradient, rows = torch.empty_like(cam), torch.empty_like(saved[0])
    _gather_gradient(rows, saved, temperature)
    _scatter(upstream, rows, saved, gradient, temperature, cosine)
    return gradient


@torch.library.custom_op("cosa_fast::contrastive_separation", mutates_args=())
def _forward(
    cam: Tensor, category: Tensor, confidence: Tensor, threshold: Tensor, valid: Tensor | None,
    limit: float, temperature: float, alpha: float, per_image: bool, cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _run_forward(cam, category, confidence, threshold, valid, limit, temperature, alpha, per_image, cosine)


@torch.library.custom_op("cosa_fast::contrastive_separation_backward", mutates_args=())
def _backward(
    upstream: Tensor, cam: Tensor, features: Tensor, labels: Tensor, slots: Tensor, counts: Tensor, statistics: Tensor,
    temperature: float, cosine: bool,
) -> Tensor:  # fmt: skip
    return _run_backward(upstream, cam, (features, labels, slots, counts, statistics), temperature, cosine)


@_forward.register_fake
def _(
    cam: Tensor, category: Tensor, confidence: Tensor, threshold: Tensor, valid: Tensor | None,
    limit: float, temperature: float, alpha: float, per_image: bool, cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (torch.empty((2,), dtype=torch.float32, device=cam.device), *_buffers(cam, per_image))


@_backward.register_fake
def _(
    upstream: Tensor, cam: Tensor, features: Tensor, labels: Tensor, slots: Tensor, counts: Tensor, statistics: Tensor,
    temperature: float, cosine: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(cam)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cam, ctx.temperature, ctx.cosine = inputs[0], inputs[6], inputs[9]
    ctx.save_for_backward(cam, *output[1:])


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (_backward(upstream, *ctx.saved_tensors, ctx.temperature, ctx.cosine), *(None,) * 9)


_forward.register_autograd(_differentiate, setup_context=_save)


def _limit(epsilon: float, beta: float) -> float:
    """P ≤ ε as a bound of −log(α·d): ε^(1/β), exactly ε for β = 1; for β = 0, P is 1."""
    if beta == 0:
        return LARGEST_LIMIT if epsilon >= 1 else -1.0
    if epsilon > 0 and log(epsilon) / beta > log(LARGEST_LIMIT):
        return LARGEST_LIMIT
    return float(epsilon) ** (1 / beta)


def contrastive_separation(
    cam: Tensor,
    category: Tensor,
    confidence: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None = None,
    *,
    epsilon: float = 1.0,
    temperature: float = 0.5,
    alpha: float = 0.8,
    beta: float = 1.0,
    scope: str = "image",
    similarity: str = "cosine",
    whole: Whole | None = None,
    backend: str = "auto",
) -> Tensor:
    """Contrastive separation of the CAM vectors of reliable pixels (eqs. 9, 10).

    Ω: usable pixels with perplexity ≤ ε. For i ∈ Ω, positives p share its pseudo-label, negatives n have another
    (background is a label like any other); the loss is
    1/|Ω| Σ_i mean_p softplus(logsumexp_n(s_in/τc) − s_ip/τc). Anchors without positives or negatives contribute 0.

    Args:
        cam: (B, C, h, w) raw CAM logits of ON; the only differentiable input.
        category: (B, h, w) integers; values outside 0..C are ignored.
        confidence: (B, h, w) in [0, 1]; below the threshold a pixel's label is background.
        threshold: ξ† strictly inside (0, 1); float or 0-d tensor.
        valid: (B, h, w) bool; None: all.
        epsilon: ε ≥ 0.
        temperature: τc > 0.
        alpha, beta: of the perplexity.
        scope: pairs within an "image", or over the whole "batch". |Ω| counts the whole batch in either.
        similarity: "cosine" (vectors of norm ≤ 1e-6 have similarity 0 to all and get no gradient) or "dot".
        whole: gives the whole batch's normaliser for that of these images, where other processes or later calls have
            the rest of the batch; the result is then these images' share of its loss.

    Returns:
        () loss; 0 with gradient 0 where Ω is empty.

    Raises:
        ValueError: wrong shape, dtype or device; a parameter out of its range.
    """
    checks = TensorChecks()
    checks.check("cam", cam, "B C h w")
    checks.check("category", category, "B h w", "integer")
    checks.check("confidence", confidence, "B h w")
    checks.check_optional("valid", valid, "B h w", "bool")
    check_threshold(threshold)
    check_number("epsilon", epsilon, 0)
    check_number("temperature", temperature, 0, open_low=True)
    check_perplexity(alpha, beta)
    check_choice("scope", scope, ("image", "batch"))
    check_choice("similarity", similarity, ("cosine", "dot"))
    if use_triton(backend, cam):
        xi, cosine = scalar_on(cam.device, threshold), similarity == "cosine"
        limit, per_image = _limit(epsilon, beta), scope == "image"
        saved = _forward(
            cam, category, confidence, xi, valid, limit, float(temperature), float(alpha), per_image, cosine
        )  # fmt: skip
        return mean_loss(saved[0], whole)
    sums = reference.contrastive_separation(
        cam,
        category,
        confidence,
        threshold,
        valid,
        epsilon=epsilon,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        scope=scope,
        similarity=similarity,
    )
    return mean_loss(sums, whole)
