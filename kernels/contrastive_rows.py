"""The vectors of low-perplexity pixels as rows for contrastive_separation, and the rows' gradient back in the CAM.

Ω: usable pixels with P ≤ ε; label ŷ where ν ≥ ξ, background below. A pixel's vector x has the C channels M ("logits")
or, with the image's labels Y, the C + 1 channels ("probability")
    q = [1 − max_c Y_c·σ(M_c), Y_1·σ(M_1), …, Y_C·σ(M_C)];
its row is f = x/‖x‖ ("cosine") or x ("dot"). In a row the classes keep their columns 0..C−1, and q_0 is column C.
q_0 is computed as σ(−M_*), where * is the present class with the largest logit, the lowest of equal ones (q_0 = 1
without any): exact also where σ(M_*) rounds to 1. Backward, from g = ∂L/∂f:
    ∂L/∂x = (g − (g·f) f)/‖x‖ ("cosine") or g ("dot"); ∂L/∂M_c = Y_c·σ'(M_c)·(∂L/∂q_c − [c = *]·∂L/∂q_0).

S = B·h·w slots of W columns, W = channels rounded up to 16, at least 32. Pixels of a group (an image, or the batch) are
partitioned stably: those of Ω first, in their order, the others behind with zeros. Each element of cam is read a few
times and each of the rows written once (1.6 MB for VOC at B = 16, h = w = 28): launch-bound. A program holds a block of
pixels and walks over their channels in tiles, so that neither registers nor shared memory depend on C.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .launch.runtime import ceil_div, configure, launch, strides, tl, triton_jit
from .perplexity import cut_off, distance, keep_inside

CHANNELS = {False: 32, True: 16}  # of a tile of pixels, by PROBABILITY: with the labels beside it, 32 would spill


class Rows(NamedTuple):
    """Ω of a batch, by slot. What lies behind the pixels of Ω of a group is 0, its labels are −1."""

    features: Tensor  # (S, W) float32: f
    labels: Tensor  # (S,) int32
    slots: Tensor  # (S,) int32: the slot of each pixel, −1 outside Ω
    counts: Tensor  # (groups,) int32: pixels of Ω in each group
    inverse_norms: Tensor  # (S,) float32: f/x, which is 1/‖x‖ or 1; 0 where x has no direction


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
    d = cut_off(distance(confidence, threshold))
    selected = inside & (category >= 0) & (category <= classes) & (-tl.log(alpha * d) <= limit)
    if HAS_VALID:
        at = b * valid_stride0 + y * valid_stride1 + x * valid_stride2
        selected = selected & (tl.load(valid_ptr + at, mask=inside, other=0) != 0)
    return selected, tl.where(confidence >= threshold, category, 0)


@triton_jit
def _sigmoid(x):
    """σ(x) and σ'(x), both to full relative precision."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small), small / ((1.0 + small) * (1.0 + small))


@triton_jit
def _logits(cam_ptr, at, channel, cam_stride1, mask):
    """(pixels, channels) tile of the CAM."""
    return tl.load(cam_ptr + at[:, None] + channel[None, :] * cam_stride1, mask=mask, other=0.0).to(tl.float32)


@triton_jit
def _present(image_labels_ptr, image, channel, image_labels_stride0, image_labels_stride1, mask):
    """(pixels, channels) tile: whether a pixel's image has the class."""
    at = image[:, None] * image_labels_stride0 + channel[None, :] * image_labels_stride1
    return tl.load(image_labels_ptr + at, mask=mask, other=0).to(tl.float32) > 0


@triton_jit
def _strongest(
    cam_ptr, image_labels_ptr, at, image, selected, classes,
    cam_stride1, image_labels_stride0, image_labels_stride1,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """M_* of each pixel and the lowest class that has it; −∞ and class −1 where the image has none."""
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    strongest = tl.full((BLOCK,), -1, tl.int32)
    for start in range(0, classes, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = selected[:, None] & (channel < classes)[None, :]
        present = _present(image_labels_ptr, image, channel, image_labels_stride0, image_labels_stride1, mask)
        logits = tl.where(present, _logits(cam_ptr, at, channel, cam_stride1, mask), float("-inf"))
        highest, index = tl.max(logits, 1, return_indices=True)
        strongest = tl.where(highest > largest, start + index, strongest)
        largest = tl.maximum(largest, highest)
    return largest, strongest


@triton_jit
def _vectors(
    cam_ptr, image_labels_ptr, at, image, channel, selected, background, classes,
    cam_stride1, image_labels_stride0, image_labels_stride1, PROBABILITY: tl.constexpr,
):  # fmt: skip
    """(pixels, channels) tile of x; 0 outside Ω and behind the last channel."""
    mask = selected[:, None] & (channel < classes)[None, :]
    values = _logits(cam_ptr, at, channel, cam_stride1, mask)
    if PROBABILITY:
        present = _present(image_labels_ptr, image, channel, image_labels_stride0, image_labels_stride1, mask)
        values = tl.where(present, _sigmoid(values)[0], 0.0)
        values = tl.where((channel == classes)[None, :], background[:, None], values)
    return values


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
    image_labels_ptr,  # (B, C) any number type, any strides: present where > 0; only read with PROBABILITY
    category_ptr,  # (B, h, w) any integer, any strides
    confidence_ptr,  # (B, h, w) any float, any strides: ν
    valid_ptr,  # (B, h, w) bool, any strides; only read with HAS_VALID
    threshold_ptr,  # () any float: ξ
    block_counts_ptr,  # (groups, blocks) int32: pixels of Ω in a block
    features_ptr,  # (S, row_width) float32, written: f by slot, 0 outside Ω
    labels_ptr,  # (S,) int32, written: label by slot, −1 outside Ω
    slots_ptr,  # (S,) int32, written: slot by pixel, −1 outside Ω
    counts_ptr,  # (groups,) int32, written: pixels of Ω in a group
    inverse_norms_ptr,  # (S,) float32, written: f/x by slot, 0 outside Ω and where x has no direction
    capacity,
    row_width,
    height, width, classes,
    cam_stride0, cam_stride1, cam_stride2, cam_stride3,
    image_labels_stride0, image_labels_stride1,
    category_stride0, category_stride1, category_stride2,
    confidence_stride0, confidence_stride1, confidence_stride2,
    valid_stride0, valid_stride1, valid_stride2,
    alpha, limit,
    zero_square,
    HAS_VALID: tl.constexpr,
    PROBABILITY: tl.constexpr,
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

    x, y, image = pixel % width, pixel // width % height, pixel // width // height
    at = image * cam_stride0 + y * cam_stride2 + x * cam_stride3
    channels = tl.arange(0, BLOCK_C).to(tl.int64)
    background = tl.zeros((BLOCK,), tl.float32)
    if PROBABILITY:
        largest, _ = _strongest(
            cam_ptr, image_labels_ptr, at, image, selected, classes,
            cam_stride1, image_labels_stride0, image_labels_stride1, BLOCK_C, BLOCK,
        )  # fmt: skip
        background = tl.where(selected, _sigmoid(-largest)[0], 0.0)
    inverse_norm = selected.to(tl.float32)
    if COSINE:
        square = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, row_width, BLOCK_C):
            values = _vectors(
                cam_ptr, image_labels_ptr, at, image, start + channels, selected, background, classes,
                cam_stride1, image_labels_stride0, image_labels_stride1, PROBABILITY,
            )  # fmt: skip
            square += tl.sum(values * values, 1)
        directed = square > zero_square
        inverse_norm = tl.where(directed, tl.rsqrt(tl.where(directed, square, 1.0)), 0.0)
    tl.store(inverse_norms_ptr + slot, inverse_norm, mask=inside)
    for start in range(0, row_width, BLOCK_C):
        channel = start + channels
        values = _vectors(
            cam_ptr, image_labels_ptr, at, image, channel, selected, background, classes,
            cam_stride1, image_labels_stride0, image_labels_stride1, PROBABILITY,
        )  # fmt: skip
        mask = inside[:, None] & (channel < row_width)[None, :]
        tl.store(features_ptr + slot[:, None] * row_width + channel[None, :], values * inverse_norm[:, None], mask=mask)


@triton_jit
def _scatter_kernel(
    upstream_ptr,  # (2,) float32, any strides: gradient of the sums; its first entry is read
    cam_ptr,  # (B, C, h, w) any float, any strides; only read with PROBABILITY
    image_labels_ptr,  # (B, C) any number type, any strides; only read with PROBABILITY
    features_ptr,  # (S, row_width) float32: f by slot
    slots_ptr,  # (S,) int32: slot by pixel, −1 outside Ω
    inverse_norms_ptr,  # (S,) float32: f/x by slot
    slopes_ptr,  # (S, row_width) float32, defined for slots of Ω: g is upstream·factor times this
    gradient_ptr,  # (B, C, h, w) cam's type, any strides, written
    size,
    row_width,
    height, width, classes,
    cam_stride0, cam_stride1, cam_stride2, cam_stride3,
    image_labels_stride0, image_labels_stride1,
    gradient_stride0, gradient_stride1, gradient_stride2, gradient_stride3,
    factor,
    PROBABILITY: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < size
    slot = tl.load(slots_ptr + pixel, mask=inside, other=-1).to(tl.int64)
    selected = slot >= 0
    row = slot * row_width
    scale = tl.load(upstream_ptr).to(tl.float32) * factor
    scale = scale * tl.load(inverse_norms_ptr + slot, mask=selected, other=0.0)
    channels = tl.arange(0, BLOCK_C).to(tl.int64)
    radial = tl.zeros((BLOCK,), tl.float32)  # g·f, the part along x that the normalisation takes away
    if COSINE:
        for start in range(0, row_width, BLOCK_C):
            at = row[:, None] + (start + channels)[None, :]
            mask = selected[:, None] & (start + channels < row_width)[None, :]
            slopes = tl.load(slopes_ptr + at, mask=mask, other=0.0)
            radial += tl.sum(slopes * tl.load(features_ptr + at, mask=mask, other=0.0), 1)
    x, y, image = pixel % width, pixel // width % height, pixel // width // height
    of_cam = image * cam_stride0 + y * cam_stride2 + x * cam_stride3
    if PROBABILITY:
        _, strongest = _strongest(
            cam_ptr, image_labels_ptr, of_cam, image, selected, classes,
            cam_stride1, image_labels_stride0, image_labels_stride1, BLOCK_C, BLOCK,
        )  # fmt: skip
        background = tl.load(slopes_ptr + row + classes, mask=selected, other=0.0)
        if COSINE:
            background -= radial * tl.load(features_ptr + row + classes, mask=selected, other=0.0)
    to = image * gradient_stride0 + y * gradient_stride2 + x * gradient_stride3
    for start in range(0, classes, BLOCK_C):
        channel = start + channels
        at = row[:, None] + channel[None, :]
        mask = selected[:, None] & (channel < classes)[None, :]
        slopes = tl.load(slopes_ptr + at, mask=mask, other=0.0)
        if COSINE:
            slopes -= radial[:, None] * tl.load(features_ptr + at, mask=mask, other=0.0)
        if PROBABILITY:
            slopes -= tl.where(channel[None, :] == strongest[:, None], background[:, None], 0.0)
            present = _present(image_labels_ptr, image, channel, image_labels_stride0, image_labels_stride1, mask)
            logits = _logits(cam_ptr, of_cam, channel, cam_stride1, mask)
            slopes = tl.where(present, slopes * _sigmoid(logits)[1], 0.0)
        result = (slopes * scale[:, None]).to(gradient_ptr.dtype.element_ty)
        mask = inside[:, None] & (channel < classes)[None, :]
        tl.store(gradient_ptr + to[:, None] + channel[None, :] * gradient_stride1, result, mask=mask)


def empty_rows(cam: Tensor, image_labels: Tensor | None, per_image: bool) -> Rows:
    """Rows of the right shapes, of which nothing is written yet."""
    images, classes, height, width = cam.shape
    channels = classes if image_labels is None else classes + 1
    size, row_width = images * height * width, max(32, 16 * ceil_div(channels, 16))
    real: dict[str, Any] = {"dtype": torch.float32, "device": cam.device}
    index: dict[str, Any] = {"dtype": torch.int32, "device": cam.device}
    return Rows(
        features=torch.empty((size, row_width), **real),
        labels=torch.empty((size,), **index),
        slots=torch.empty((size,), **index),
        counts=torch.empty((images if per_image else 1,), **index),
        inverse_norms=torch.empty((size,), **real),
    )


def select_rows(
    cam: Tensor, image_labels: Tensor | None, category: Tensor, confidence: Tensor, threshold: Tensor,
    valid: Tensor | None, limit: float, alpha: float, per_image: bool, cosine: bool,
) -> Rows:  # fmt: skip
    """The rows of Ω; of probabilities where image labels are given, else of logits."""
    rows = empty_rows(cam, image_labels, per_image)
    classes, height, width = cam.shape[1:]
    groups = len(rows.counts)
    capacity = len(rows.slots) // groups
    configuration = configure("contrastive_separation_select", capacity, cam.device)
    blocks = ceil_div(capacity, configuration.blocks["BLOCK"])
    block_counts = torch.empty((groups, blocks), dtype=torch.int32, device=cam.device)
    of_valid = category if valid is None else valid  # not read where there is none
    selection: dict[str, Any] = {
        "category_ptr": category, "confidence_ptr": confidence, "valid_ptr": of_valid, "threshold_ptr": threshold,
        "block_counts_ptr": block_counts,
        "capacity": capacity, "height": height, "width": width, "classes": classes,
        **strides("category_stride", category), **strides("confidence_stride", confidence),
        **strides("valid_stride", of_valid), "alpha": alpha, "limit": limit, "HAS_VALID": valid is not None,
    }  # fmt: skip
    launch(_count_kernel, (blocks, groups), configuration, **selection)
    launch(
        _partition_kernel,
        (blocks, groups),
        configuration,
        **selection,
        **_maps(cam, image_labels),
        features_ptr=rows.features,
        labels_ptr=rows.labels,
        slots_ptr=rows.slots,
        counts_ptr=rows.counts,
        inverse_norms_ptr=rows.inverse_norms,
        row_width=rows.features.shape[1],
        zero_square=reference.ZERO_NORM**2,
        COSINE=cosine,
        SCAN=1 << (blocks - 1).bit_length(),
    )
    return rows


def scatter_rows(
    upstream: Tensor, cam: Tensor, image_labels: Tensor | None, rows: Rows, slopes: Tensor, factor: float, cosine: bool
) -> Tensor:
    """The gradient of cam where that of the rows is upstream[0]·factor·slopes; slopes (S, W) by slot."""
    gradient = torch.empty_like(cam)
    size, row_width = rows.features.shape
    classes, height, width = cam.shape[1:]
    configuration = configure("contrastive_separation_scatter", size, cam.device)
    launch(
        _scatter_kernel,
        (ceil_div(size, configuration.blocks["BLOCK"]),),
        configuration,
        **_maps(cam, image_labels),
        upstream_ptr=upstream,
        features_ptr=rows.features,
        slots_ptr=rows.slots,
        inverse_norms_ptr=rows.inverse_norms,
        slopes_ptr=slopes,
        gradient_ptr=gradient,
        size=size,
        row_width=row_width,
        height=height,
        width=width,
        classes=classes,
        **strides("gradient_stride", gradient),
        factor=factor,
        COSINE=cosine,
    )
    return gradient


def _maps(cam: Tensor, image_labels: Tensor | None) -> dict[str, Any]:
    """The arguments that say what the vectors are made of."""
    of_labels = cam[:, :, 0, 0] if image_labels is None else image_labels  # not read where there are none
    probability = image_labels is not None
    return {
        "cam_ptr": cam, **strides("cam_stride", cam),
        "image_labels_ptr": of_labels, **strides("image_labels_stride", of_labels),
        "PROBABILITY": probability, "BLOCK_C": CHANNELS[probability],
    }  # fmt: skip
