"""Contrastive separation over low-perplexity pixels (eqs. 9, 10).

Ω: usable pixels with P ≤ ε; label ŷ where ν ≥ ξ, background below. For i ∈ Ω with positives R⁺_i (same label) and
negatives R⁻_i (another), in the same image or in the batch, s_ij = f_i·f_j/τ with the rows f of contrastive_rows.py,
ℓ_i = mean_p softplus(L_i − s_ip), L_i = logsumexp_n s_in; results are (Σ_i ℓ_i, |Ω|). Backward: with w_i = 1/|R⁺_i| and
A_i = w_i Σ_p σ(L_i − s_ip) = dℓ_i/dL_i,
    D_ij = dℓ_i/ds_ij = −w_i σ(L_i − s_ij) for a positive j, A_i exp(s_ij − L_i) for a negative one;
    dΣℓ/df_i = Σ_j (D_ij + D_ji) f_j / τ.

Four steps; S = B·h·w slots, rows of W columns:
1. Selection (contrastive_rows.py): the pixels of Ω as rows, one group (an image, or the batch) after the other.
2. Loss: a program holds a tile of anchors and walks over the group's |Ω| rows twice, for L_i and for the terms
   that need L_i: no (N, N) tensor, 2·|Ω|² dot products of length W, 2·|Ω|² exps. Leaves L_i, w_i, A_i per slot.
3. Gradient of the rows: a tile of rows gathers D_ij + D_ji from those scalars of i and j, so nothing is added
   atomically: |Ω|² dot products, |Ω|² rank-one updates, 2·|Ω|² exps. Rows wider than a tile are split over programs,
   which all recompute s.
4. Gradient of the CAM (contrastive_rows.py): from each row back to its pixel.
|Ω| stays on the device: grids are sized for full groups, and programs behind |Ω| leave at once. The rows fit into
L2 (S·W·4 bytes: 1.6 MB for VOC at B = 16, h = w = 28), so the limit is float32 arithmetic, not bytes. Everything that a
program may read is defined: slots behind |Ω| hold zeros and label −1, and tiles that reach behind a group repeat its
last slot under a label that takes part in nothing; so the inner loops need almost no masks.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .contrastive_rows import Rows, empty_rows, scatter_rows, select_rows
from .launch.runtime import ceil_div, configure, launch, scalar_on, tl, triton_jit, use_triton
from .sums import Whole, mean_loss
from .triton_functions import log1p
from .validation import TensorChecks, check_choice, check_number, check_perplexity, check_threshold, fail

LARGEST_LIMIT = 1e34  # stands for any larger bound of −log(α·d)


@triton_jit
def _tile(features_ptr, slots, columns, width, WHOLE: tl.constexpr):
    """(slots, columns) tile of the rows; WHOLE: no column lies behind the width."""
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
            rows_i = _tile(features_ptr, i, columns, width, WHOLE)
            rows_j = _tile(features_ptr, j, columns, width, WHOLE)
            scores = tl.dot(rows_i, tl.trans(rows_j), scores, input_precision="ieee")
    return scores * inverse_temperature


@triton_jit
def _slope(margin, same, weight, pull):
    """D of an anchor, m = L − s: −w·σ(m) for a positive, A·exp(−m) for a negative, where only rounding makes m < 0."""
    small = tl.exp(-tl.abs(margin))
    attraction = -weight * tl.where(margin >= 0, 1.0, small) / (1.0 + small)
    return tl.where(same, attraction, pull * tl.where(margin >= 0, small, 1.0))


@triton_jit
def _loss_kernel(
    features_ptr,  # (S, row_width) float32: f by slot
    labels_ptr,  # (S,) int32: label by slot
    counts_ptr,  # (groups,) int32: pixels of Ω in a group
    statistics_ptr,  # (3, S) float32, written: L, w, A by slot; 0 outside Ω
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
    first_i = _tile(features_ptr, i, columns, row_width, WHOLE)

    top = tl.full((BLOCK_I,), -1e30, tl.float32)
    mass = tl.zeros((BLOCK_I,), tl.float32)
    equals = tl.zeros((BLOCK_I,), tl.int32)
    for start in range(0, reach, BLOCK_J):
        of_j = start + tl.arange(0, BLOCK_J)
        j = base + tl.minimum(of_j, capacity - 1)
        label_j = tl.load(labels_ptr + j)
        first_j = _tile(features_ptr, j, columns, row_width, WHOLE)
        scores = _scores(
            features_ptr, first_i, first_j, i, j, row_width, inverse_temperature, SINGLE, WHOLE, BLOCK_C
        )  # fmt: skip
        # What lies behind Ω has a label of its own, and adds exp(−2e30 − top) = 0 to the negatives.
        label_j = tl.where(of_j < count, label_j, -2)
        scores += tl.where(of_j < count, 0.0, -2e30)[None, :]
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
        first_j = _tile(features_ptr, j, columns, row_width, WHOLE)
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
    tl.store(statistics_ptr + i, logsumexp, mask=within)
    tl.store(statistics_ptr + size + i, weight, mask=within)
    tl.store(statistics_ptr + 2 * size + i, weight * pull, mask=within)
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
    statistics_ptr,  # (3, S) float32: L, w, A by slot
    slopes_ptr,  # (S, row_width) float32, written for slots of Ω: Σ_j (D_ij + D_ji) f_j
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
        first_i = _tile(features_ptr, i, columns, row_width, WHOLE)
        label_i = tl.load(labels_ptr + i)
        logsumexp_i = tl.load(statistics_ptr + i)
        weight_i = tl.load(statistics_ptr + size + i)
        pull_i = tl.load(statistics_ptr + 2 * size + i)
        gathered = tl.zeros((BLOCK_I, BLOCK_G), tl.float32)
        for start in range(0, count, BLOCK_J):
            of_j = start + tl.arange(0, BLOCK_J)
            j = base + tl.minimum(of_j, capacity - 1)
            label_j = tl.load(labels_ptr + j)
            logsumexp_j = tl.load(statistics_ptr + j)
            weight_j = tl.load(statistics_ptr + size + j)
            pull_j = tl.load(statistics_ptr + 2 * size + j)
            first_j = _tile(features_ptr, j, columns, row_width, WHOLE)
            scores = _scores(
                features_ptr, first_i, first_j, i, j, row_width, inverse_temperature, SINGLE, WHOLE, BLOCK_C
            )  # fmt: skip
            # What lies behind Ω has a label of its own, and is so unlike every row that its slope is exp(−2e30) = 0.
            label_j = tl.where(of_j < count, label_j, -2)
            scores += tl.where(of_j < count, 0.0, -2e30)[None, :]
            same = label_i[:, None] == label_j[None, :]
            slope = _slope(logsumexp_i[:, None] - scores, same, weight_i[:, None], pull_i[:, None])
            slope += _slope(logsumexp_j[None, :] - scores, same, weight_j[None, :], pull_j[None, :])
            slope = tl.where(of_i[:, None] != of_j[None, :], slope, 0.0)
            values = first_j if SINGLE and BLOCK_G == BLOCK_C else _tile(features_ptr, j, written, row_width, WHOLE_G)
            gathered = tl.dot(slope, values, gathered, input_precision="ieee")
        mask = (of_i < count)[:, None] & (written < row_width)[None, :]
        tl.store(slopes_ptr + i[:, None] * row_width + written[None, :], gathered, mask=mask)


def _pairs(rows: Rows, temperature: float) -> dict[str, Any]:
    """The arguments of the two kernels that walk over pairs."""
    size, row_width = rows.features.shape
    return {
        "features_ptr": rows.features, "labels_ptr": rows.labels, "counts_ptr": rows.counts,
        "capacity": size // len(rows.counts), "size": size, "row_width": row_width,
        "inverse_temperature": 1 / temperature,
    }  # fmt: skip


def _fit(row_width: int, block: int) -> dict[str, bool]:
    """Whether a row is one block of columns, and whether it is whole blocks."""
    return {"SINGLE": row_width <= block, "WHOLE": row_width % block == 0}


def _sum_losses(rows: Rows, temperature: float) -> tuple[Tensor, Tensor]:
    """(2,) sums Σ ℓ, |Ω|, and (3, S) L, w, A by slot."""
    device, groups = rows.features.device, len(rows.counts)
    size, row_width = rows.features.shape
    configuration = configure("contrastive_separation_loss", row_width, device)
    tiles = ceil_div(size // groups, configuration.blocks["BLOCK_I"])
    statistics = torch.empty((3, size), dtype=torch.float32, device=device)
    partial = torch.empty((groups, tiles), dtype=torch.float32, device=device)
    launch(
        _loss_kernel,
        (tiles, groups),
        configuration,
        **_pairs(rows, temperature),
        **_fit(row_width, configuration.blocks["BLOCK_C"]),
        statistics_ptr=statistics,
        partial_ptr=partial,
    )
    sums = torch.empty((2,), dtype=torch.float32, device=device)
    launch(
        _total_kernel,
        (1,),
        configure("contrastive_separation_total", partial.numel(), device),
        partial_ptr=partial,
        counts_ptr=rows.counts,
        sums_ptr=sums,
        partials=partial.numel(),
        groups=groups,
    )
    return sums, statistics


def _gather_slopes(rows: Rows, statistics: Tensor, temperature: float) -> Tensor:
    """(S, W) Σ_j (D_ij + D_ji) f_j by slot, for slots of Ω; the others are left undefined."""
    slopes = torch.empty_like(rows.features)
    size, row_width = slopes.shape
    configuration = configure("contrastive_separation_gradient", row_width, slopes.device)
    blocks, groups = configuration.blocks, len(rows.counts)
    launch(
        _gradient_kernel,
        (ceil_div(size // groups, blocks["BLOCK_I"]), groups, ceil_div(row_width, blocks["BLOCK_G"])),
        configuration,
        **_pairs(rows, temperature),
        **_fit(row_width, blocks["BLOCK_C"]),
        WHOLE_G=row_width % blocks["BLOCK_G"] == 0,
        statistics_ptr=statistics,
        slopes_ptr=slopes,
    )
    return slopes


def _run_forward(
    cam: Tensor, image_labels: Tensor | None, category: Tensor, confidence: Tensor, threshold: Tensor,
    valid: Tensor | None, limit: float, temperature: float, alpha: float, per_image: bool, cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums, then what the backward needs: statistics and the rows. Probabilities where image labels are given."""
    rows = select_rows(cam, image_labels, category, confidence, threshold, valid, limit, alpha, per_image, cosine)
    return (*_sum_losses(rows, temperature), *rows)


def _run_backward(
    upstream: Tensor, cam: Tensor, image_labels: Tensor | None, statistics: Tensor,
    features: Tensor, labels: Tensor, slots: Tensor, counts: Tensor, inverse_norms: Tensor,
    temperature: float, cosine: bool,
) -> Tensor:  # fmt: skip
    """The gradient of cam from that of the sums."""
    rows = Rows(features, labels, slots, counts, inverse_norms)
    slopes = _gather_slopes(rows, statistics, temperature)
    return scatter_rows(upstream, cam, image_labels, rows, slopes, 1 / temperature, cosine)


_forward = torch.library.custom_op("cosa_fast::contrastive_separation", _run_forward, mutates_args=())
_backward = torch.library.custom_op("cosa_fast::contrastive_separation_backward", _run_backward, mutates_args=())


@_forward.register_fake
def _(cam: Tensor, image_labels: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    rows = empty_rows(cam, image_labels, per_image=rest[7])
    sums, statistics = (cam.new_empty(shape, dtype=torch.float32) for shape in ((2,), (3, len(rows.slots))))
    return (sums, statistics, *rows)


@_backward.register_fake
def _(upstream: Tensor, cam: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(cam)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cam, image_labels, *_ = inputs
    ctx.temperature, ctx.cosine = inputs[7], inputs[10]
    ctx.save_for_backward(cam, image_labels, *output[1:])


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (_backward(upstream, *ctx.saved_tensors, ctx.temperature, ctx.cosine), *(None,) * 10)


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
    vectors: str = "logits",
    image_labels: Tensor | None = None,
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
        cam: (B, C, h, w) raw CAM logits M of ON; the only differentiable input.
        category: (B, h, w) integers; values outside 0..C are ignored.
        confidence: (B, h, w) in [0, 1]; below the threshold a pixel's label is background.
        threshold: ξ† strictly inside (0, 1); float or 0-d tensor.
        valid: (B, h, w) bool; None: all.
        vectors: what is compared. "logits": M. "probability": [1 − max_c Y_c·σ(M_c), Y_1·σ(M_1), …, Y_C·σ(M_C)], the
            CAM with a background channel of its own, absent classes 0. The maximum's gradient goes to the largest
            logit of the present classes, among equals to the lowest class.
        image_labels: (B, C), Y, present where > 0, any dtype; "probability" needs it, "logits" does not read it.
        epsilon: ε ≥ 0.
        temperature: τc > 0.
        alpha, beta: of the perplexity.
        scope: pairs within an "image", or over the whole "batch". |Ω| counts the whole batch in either.
        similarity: "cosine" (vectors of norm ≤ 1e-6 have similarity 0 to all and get no gradient) or "dot".
        whole: for a batch that is computed in parts (by several processes, or in several calls): maps |Ω| of these
            images to that of the whole batch. The result is then these images' share of the batch's loss.

    Returns:
        () loss; 0 with gradient 0 where Ω is empty.

    Raises:
        ValueError: wrong shape, dtype or device; a parameter out of its range; "probability" without image labels.
    """
    checks = TensorChecks()
    checks.check("cam", cam, "B C h w")
    checks.check("category", category, "B h w", "integer")
    checks.check("confidence", confidence, "B h w")
    checks.check_optional("valid", valid, "B h w", "bool")
    checks.check_optional("image_labels", image_labels, "B C", "number")
    check_threshold(threshold)
    check_choice("vectors", vectors, ("logits", "probability"))
    check_number("epsilon", epsilon, 0)
    check_number("temperature", temperature, 0, open_low=True)
    check_perplexity(alpha, beta)
    check_choice("scope", scope, ("image", "batch"))
    check_choice("similarity", similarity, ("cosine", "dot"))
    if vectors == "logits":
        image_labels = None
    elif image_labels is None:
        raise fail("image_labels", None, "a tensor of shape (B, C) for vectors = 'probability'")
    if use_triton(backend, cam):
        xi, cosine = scalar_on(cam.device, threshold), similarity == "cosine"
        limit, per_image = _limit(epsilon, beta), scope == "image"
        sums, *_ = _forward(
            cam, image_labels, category, confidence, xi, valid,
            limit, float(temperature), float(alpha), per_image, cosine,
        )  # fmt: skip
        return mean_loss(sums, whole)
    values = len(cam) * confidence[0].numel() ** 2
    plain = cpu if cpu.pays("contrastive_separation", backend, cam, values) else reference
    sums = plain.contrastive_separation(
        cam,
        image_labels,
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
