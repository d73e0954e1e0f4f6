"""The operators of CoSA in plain PyTorch: their definition, the oracle of faster versions, and the CPU path.

Arguments are taken as checked (cosa_fast.kernels checks them). Half types are computed in float32; float64 stays
float64, so that derivatives can be checked. Present classes of a batch are handled in slots: P is the largest number
of classes that one image has, and absent classes cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..validation import MAX_UINT8_CLASSES
from .mixture import UNFITTED, Mixture, fit, split
from .resample import ReducedPixels, resize

MIN_MAX_EPSILON = 1e-5  # of the min–max normalisation of CAMs
DISTANCE_FLOOR = 1e-4  # d of eq. 4 is cut off here: the perplexity stays finite at the threshold
THRESHOLD_MARGIN = 1e-6  # ξ of a tensor, whose value nobody checked, is kept this far inside (0, 1)
ZERO_NORM = 1e-6  # CAM vectors up to this norm have no direction
# Subnormal numbers are 40 times slower on a CPU: the Gaussian kernel stays above e^-50, and the values that it filters
# are 0 below 1e-15 of the largest: both are nothing in float32, and their products are normal numbers.
KERNEL_FLOOR = -50.0
VALUE_FLOOR = 1e-15
TILE_ELEMENTS = 2**20  # of the Gaussian kernel matrix held at once: 4 MiB stay in the cache


def real(tensor: Tensor) -> Tensor:
    """The tensor in the type of the arithmetic: float64 as it is, everything else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def category_type(num_classes: int) -> torch.dtype:
    """uint8 while the ignore index 255 is free, otherwise int16."""
    return torch.uint8 if num_classes <= MAX_UINT8_CLASSES else torch.int16


def present_slots(image_labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C) labels → each image's present classes, ascending: index 0..C−1 (B, P) int64, filled (B, P) bool."""
    present = image_labels > 0
    slots = max(int(present.sum(1).max()), 1)
    classes = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    return classes, present.gather(1, classes)


@torch.no_grad()
def fuse_cams(
    cams: Sequence[Tensor], image_labels: Tensor, size: tuple[int, int], valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ν and ŷ of METHOD section 3: flip-max, ReLU, sum over scales, min–max over valid pixels, max over classes."""
    classes, filled = present_slots(image_labels)
    image, slot = filled.nonzero(as_tuple=True)
    fused = _fuse_scales(cams, image, classes[image, slot], size)  # (pairs, H, W)
    inside = torch.ones(len(filled), *size, dtype=torch.bool, device=fused.device) if valid is None else valid
    scores = fused.new_full((*filled.shape, *size), -1.0)
    scores[image, slot] = _min_max(fused, inside[image])
    confidence, best = scores.max(dim=1)  # ties go to the lowest class
    category = classes.gather(1, best.flatten(1)).view_as(best) + 1
    empty = ~inside | ~filled.any(1)[:, None, None]
    return confidence.masked_fill(empty, 0), category.masked_fill(empty, 0).to(category_type(image_labels.shape[1]))


def _fuse_scales(cams: Sequence[Tensor], image: Tensor, category: Tensor, size: tuple[int, int]) -> Tensor:
    """Σ_s relu(max(CAM_s, flipped back CAM_s)) on the full grid for the given (image, class) pairs: (pairs, H, W)."""
    fused = real(cams[0]).new_zeros(len(image), *size)
    for cam in cams:
        plain = real(cam[image, category])
        flipped = real(cam[len(cam) // 2 + image, category]).flip(-1)
        plain, flipped = (resize(maps[:, None], size)[:, 0] for maps in (plain, flipped))
        fused += torch.maximum(plain, flipped).relu()
    return fused


def _min_max(maps: Tensor, inside: Tensor) -> Tensor:
    """(x − min) / (max − min + 1e-5) of each (H, W) map with the extremes of the pixels inside."""
    low = maps.masked_fill(~inside, torch.inf).amin((1, 2), keepdim=True)
    high = maps.masked_fill(~inside, -torch.inf).amax((1, 2), keepdim=True)
    return (maps - low) / (high - low + MIN_MAX_EPSILON)


def _inside(threshold: float | Tensor, like: Tensor) -> Tensor:
    """ξ as a tensor of the confidence's type and device, strictly inside (0, 1)."""
    threshold = torch.as_tensor(threshold, dtype=like.dtype, device=like.device)
    return threshold.clamp(THRESHOLD_MARGIN, 1 - THRESHOLD_MARGIN)


def perplexity(confidence: Tensor, threshold: float | Tensor, alpha: float = 0.8, beta: float = 1.0) -> Tensor:
    """Eq. 4: P = [−log(α·d)]^β with d = (ν−ξ)/(1−ξ) where ν ≥ ξ and (ξ−ν)/ξ below, d in [1e-4, 1]."""
    confidence = real(confidence)
    threshold = _inside(threshold, confidence)
    above = (confidence - threshold) / (1 - threshold)
    below = (threshold - confidence) / threshold
    distance = torch.where(confidence >= threshold, above, below).clamp(DISTANCE_FLOOR, 1)
    return (-(alpha * distance).log()) ** beta


def pseudo_labels(
    confidence: Tensor,
    category: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None,
    num_classes: int,
    ignore_band: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """CPL (METHOD section 4) as (label int64, 0 where unusable; usable bool). Categories outside 0..C are unusable.

    The category where ν ≥ ξ, background below. With a band (low, high): the category where ν ≥ high, background where
    ν ≤ low, unusable between.
    """
    category = category.long()
    usable = (category >= 0) & (category <= num_classes)
    if valid is not None:
        usable = usable & valid
    if ignore_band is None:
        foreground = confidence >= _inside(threshold, confidence)
    else:
        low, high = ignore_band
        foreground = confidence >= high
        usable = usable & (foreground | (confidence <= low))
    return category.where(foreground & usable, 0), usable


def raw_cross_entropy(
    logits: Tensor,
    confidence: Tensor,
    category: Tensor,
    threshold: Tensor,
    valid: Tensor | None,
    *,
    alpha: float,
    beta: float,
    ignore_band: tuple[float, float] | None,
) -> Tensor:
    """Sums of eq. 5 for T targets (T, B, H, W) on the same logits, apart for background and foreground pixels:
    (T, 2, 2), the last axis being Σ r·CE and Σ r with r = 1/P."""
    logits, confidence = real(logits), real(confidence.detach())
    threshold = threshold.reshape(-1, 1, 1, 1)
    label, usable = pseudo_labels(confidence, category, threshold, valid, logits.shape[1] - 1, ignore_band)
    reliability = perplexity(confidence, threshold, alpha, beta).reciprocal() * usable
    reliability = reliability.to(logits.dtype)
    log_probability = resize(logits, (confidence.shape[2], confidence.shape[3])).log_softmax(1)
    cross_entropy = -log_probability.gather(1, label.transpose(0, 1)).transpose(0, 1)  # (T, B, H, W)
    terms = torch.stack((reliability * cross_entropy, reliability), 1)  # (T, 2, B, H, W)
    foreground = (label > 0)[:, None]
    return torch.stack([(terms * side).sum((2, 3, 4)) for side in (~foreground, foreground)], 1)


def seg_to_cam_loss(
    cam: Tensor,
    teacher_logits: Sequence[Tensor],
    image_labels: Tensor,
    size: tuple[int, int],
    valid: Tensor | None,
    *,
    temperature: float,
    relu: bool,
) -> Tensor:
    """Eqs. 7, 8: (2,) sum of the binary cross entropy of σ(M), or of σ(relu(M)), against SPL on the (h, w) grid, and
    the number of its terms."""
    cam = real(cam)
    pixels = ReducedPixels(size, (cam.shape[2], cam.shape[3]), cam.device)
    target = _segmentation_target(teacher_logits, image_labels, pixels, temperature).to(cam.dtype)
    loss = F.binary_cross_entropy_with_logits(cam.relu() if relu else cam, target, reduction="none")
    if valid is None:
        return torch.stack((loss.sum(), loss.new_tensor(loss.numel())))
    inside = pixels.all_true(valid)[:, None]
    return torch.stack((loss.where(inside, 0).sum(), (inside.sum() * cam.shape[1]).to(loss.dtype)))


@torch.no_grad()
def _segmentation_target(
    teacher_logits: Sequence[Tensor], image_labels: Tensor, pixels: ReducedPixels, temperature: float
) -> Tensor:
    """Eq. 7, SPL on the (h, w) grid: softmax(S'/τ) over background and present classes; (B, C, h, w)."""
    classes, filled = present_slots(image_labels)
    batch, categories = image_labels.shape
    channels = F.pad(classes + 1, (1, 0))  # (B, 1 + P) channels of S', background first
    image = torch.arange(batch, device=channels.device)[:, None]
    flips_summed = (
        real(maps[image, channels]) + real(maps[batch + image, channels]).flip(-1) for maps in teacher_logits
    )
    summed = torch.stack([pixels.evaluate(maps) for maps in flips_summed]).sum(0)
    absent = F.pad(~filled, (1, 0))[:, :, None, None]
    probability = (summed / temperature).masked_fill(absent, -torch.inf).softmax(1)
    reduced = pixels.reduce(probability[:, 1:])
    target = reduced.new_zeros(batch, categories, *reduced.shape[2:])
    target[image.expand_as(classes)[filled], classes[filled]] = reduced[filled]
    return target


def contrastive_separation(
    cam: Tensor,
    image_labels: Tensor | None,
    category: Tensor,
    confidence: Tensor,
    threshold: float | Tensor,
    valid: Tensor | None,
    *,
    epsilon: float,
    temperature: float,
    alpha: float,
    beta: float,
    scope: str,
    similarity: str,
) -> Tensor:
    """Eqs. 9, 10: (2,) sum over the anchors of Ω, the usable pixels with P ≤ ε, and |Ω|; pairs within an image, or over
    the batch (scope "batch"). With image labels the vectors are the CAM's probabilities, without them its logits."""
    confidence = real(confidence.detach())
    label, usable = pseudo_labels(confidence, category, threshold, valid, cam.shape[1])
    selected = usable & (perplexity(confidence, threshold, alpha, beta) <= epsilon)
    channels = real(cam) if image_labels is None else _probabilities(real(cam), image_labels)
    vectors = channels.flatten(2).transpose(1, 2)  # (B, N, C), or (B, N, 1 + C)
    if similarity == "cosine":
        vectors = _directions(vectors)
    label, selected = label.flatten(1), selected.flatten(1)
    count = selected.sum()
    if scope == "batch":  # all of Ω as one image without other pixels
        vectors, label, selected = vectors[selected][None], label[selected][None], selected[selected][None]
    total = _separation(vectors @ vectors.mT / temperature, label, selected)
    return torch.stack((total, count.to(total.dtype)))


def _probabilities(cam: Tensor, image_labels: Tensor) -> Tensor:
    """(B, C, h, w) logits M and labels Y → (B, 1 + C, h, w) [1 − max_c Y_c·σ(M_c), Y_1·σ(M_1), …, Y_C·σ(M_C)]."""
    present = (image_labels > 0)[:, :, None, None]
    # As σ is monotone and 1 − σ(x) = σ(−x). Of equal maxima, max(dim) takes the first; of none it leaves −∞: σ is 1.
    largest = cam.masked_fill(~present, -torch.inf).max(1, keepdim=True).values
    return torch.cat(((-largest).sigmoid(), cam.sigmoid().where(present, 0)), 1)


def _directions(vectors: Tensor) -> Tensor:
    """Vectors (..., C) scaled to norm 1; those without a direction become constant zeros: no NaN gradient."""
    square = vectors.square().sum(-1, keepdim=True)
    directed = square > ZERO_NORM**2
    return (vectors * square.where(directed, 1).rsqrt()).where(directed, 0)


def _separation(scores: Tensor, label: Tensor, selected: Tensor) -> Tensor:
    """Σ over anchors of the mean over positives p of softplus(logsumexp over negatives − s_p); scores (G, N, N)."""
    pairs = selected[:, :, None] & selected[:, None, :]
    equal = label[:, :, None] == label[:, None, :]
    itself = torch.eye(label.shape[1], dtype=torch.bool, device=label.device)
    positive, negative = pairs & equal & ~itself, pairs & ~equal
    # Rows without negatives count nothing, but a logsumexp over nothing would still turn their gradient into NaN.
    anchors = negative.any(2, keepdim=True)
    negatives = scores.masked_fill(~negative & anchors, -torch.inf).logsumexp(2, keepdim=True)
    terms = -F.logsigmoid(scores - negatives)
    weight = (positive & anchors).to(scores.dtype) / positive.sum(2, keepdim=True).clamp(min=1)
    return (weight * terms).sum()


@torch.no_grad()
def histogram(confidence: Tensor, valid: Tensor | None, bins: int = 256) -> Tensor:
    """Counts of the valid confidences in equal bins [k/bins, (k+1)/bins) over [0, 1]; 1 falls into the last bin."""
    index = (real(confidence) * bins).long().clamp(0, bins - 1)
    index = index.flatten() if valid is None else index[valid]
    return torch.bincount(index, minlength=bins).float()


@torch.no_grad()
def fit_mixture(
    histogram: Tensor,
    state: Tensor | None = None,
    *,
    floor: float = 0.05,
    clamp: tuple[float, float] = (0.2, 0.9),
    smoothing: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """ξ of eq. 6 from a two-component Gaussian mixture; state = (ξ, weight, mean, mean, variance, variance)."""
    low, high = clamp
    previous = None if state is None else state.tolist()
    start = Mixture(*previous[1:]) if previous and previous[1] > 0 else None
    counts = histogram.double().cpu().numpy()
    mixture = fit(counts, floor, start)
    found = None if mixture is None else split(counts, floor, mixture)
    if mixture is None or found is None:
        kept = [(low + high) / 2, *UNFITTED] if previous is None else previous
        kept[0] = min(max(kept[0], low), high)
        result = torch.tensor(kept, dtype=torch.float32, device=histogram.device)
        return result[0].clone(), result
    threshold = min(max(found, low), high)
    if start is not None and previous is not None:
        threshold = min(max(smoothing * previous[0] + (1 - smoothing) * threshold, low), high)
    result = torch.tensor([threshold, *mixture], dtype=torch.float32, device=histogram.device)
    return result[0].clone(), result


@torch.no_grad()
def adamw_ema_(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: Tensor,
    lr: float | Tensor,
    *,
    lr_multiplier: float | Tensor = 1.0,
    weight_decay: float | Tensor = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float | Tensor,
    segments: Tensor | None = None,
    parameters_bf16: Tensor | None = None,
    ema_bf16: Tensor | None = None,
    enabled: Tensor | None = None,
) -> None:
    """One AdamW step with decoupled decay, then Θ' ← mΘ' + (1−m)Θ, in place on flat float32 buffers; nothing where
    `enabled` holds False."""
    if segments is not None:
        elements = torch.arange(len(parameters), device=segments.device)
        group = torch.bucketize(elements, segments, right=True).clamp_(max=len(segments) - 1)
        lr_multiplier, weight_decay = (
            option[group] if isinstance(option, Tensor) and option.ndim else option
            for option in (lr_multiplier, weight_decay)
        )
    gradients = gradients.float()
    beta1, beta2 = betas
    # Disabled is a step of rate 0 with gradient 0: cheaper than keeping the old values.
    on: float | Tensor = 1.0
    follow: float | Tensor = 1 - beta1
    decay: float | Tensor = beta2
    if enabled is not None:
        on, gradients = enabled.double(), gradients.where(enabled, 0)
        follow, decay = (on * follow).to(exp_avg.dtype), torch.where(enabled, beta2, 1.0)
    step += 1 if enabled is None else enabled
    exp_avg.lerp_(gradients, follow)
    exp_avg_sq.mul_(decay).addcmul_(gradients, gradients, value=1 - beta2)
    # 1 − β₂^t starts at 1e-3: taken in float64, as float32 would lose four digits of it.
    correction1, correction2 = (1 - beta ** step.double().clamp(min=1) for beta in betas)
    denominator = (exp_avg_sq / correction2).sqrt_().add_(eps)
    rate = lr * lr_multiplier * on
    # Not Θ·(1 − ηλ): 1 − 6e-7 has one digit of ηλ left in float32.
    parameters.sub_(parameters * (rate * weight_decay))
    parameters.sub_(rate * (exp_avg / correction1) / denominator)
    ema.add_((parameters - ema) * ((1 - momentum) * on))
    if parameters_bf16 is not None:
        parameters_bf16.copy_(parameters)
    if ema_bf16 is not None:
        ema_bf16.copy_(ema)


def _gaussian_filter(values: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """A(V)_i = Σ_j exp(−½|f_i − f_j|²)·V_j with f = (xy/σ_xy, rgb/σ_rgb), the pair i = j included; (B, K, h, w)."""
    values = real(values)
    height, width = values.shape[2:]
    rows, columns = (torch.arange(n, dtype=values.dtype, device=values.device) for n in (height, width))
    position = torch.stack(torch.meshgrid(rows, columns, indexing="ij")) / sigma_xy
    filtered = [
        _filter_points(torch.cat((position, image.to(values) / sigma_rgb)).flatten(1).T, points.flatten(1).T)
        for image, points in zip(guide, values, strict=True)
    ]
    return torch.stack(filtered).mT.reshape(values.shape)


def _filter_points(features: Tensor, values: Tensor) -> Tensor:
    """Gaussian kernel of (N, 5) features applied to (N, K) values, in tiles of rows: (N, K)."""
    # −½|a − b|² = a·b − ½|a|² − ½|b|² as one matrix product; small centred features keep its cancellation harmless.
    features = features - features.mean(0)
    half_square = features.square().sum(1, keepdim=True) / 2
    one = torch.ones_like(half_square)
    left, right = torch.cat((features, -half_square, one), 1), torch.cat((features, one, -half_square), 1).T
    largest = values.abs().max()
    scale = largest.where(largest > 0, 1)
    values = values / scale
    values = values.where(values.abs() >= VALUE_FLOOR, 0)
    tile = max(TILE_ELEMENTS // len(features), 1)
    filtered = [(rows @ right).clamp_(min=KERNEL_FLOOR).exp_() @ values for rows in left.split(tile)]
    return torch.cat(filtered) * scale


class _BilateralFilter(torch.autograd.Function):
    """The kernel is symmetric: the gradient of the values is the filtered gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
        ctx.save_for_backward(guide)
        ctx.sigmas, ctx.dtype = (sigma_xy, sigma_rgb), values.dtype
        return _gaussian_filter(values, guide, sigma_xy, sigma_rgb)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (guide,) = ctx.saved_tensors
        return _gaussian_filter(gradients[0], guide, *ctx.sigmas).to(ctx.dtype), None, None, None


class _DenseEnergy(torch.autograd.Function):
    """−Σ S·A(S)·gate / B with the method's own backward −2·gate·A(S)/B, the derivative where the gate is constant."""

    @staticmethod
    def forward(
        ctx: Any, probabilities: Tensor, guide: Tensor, gate: Tensor, sigma_xy: float, sigma_rgb: float
    ) -> Tensor:
        gated = _gaussian_filter(probabilities, guide, sigma_xy, sigma_rgb)
        gated *= real(gate)[:, None] / len(gate)
        ctx.save_for_backward(gated)
        ctx.dtype = probabilities.dtype
        return -(real(probabilities) * gated).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gated,) = ctx.saved_tensors
        return (gradients[0] * -2 * gated).to(ctx.dtype), None, None, None, None


def bilateral_filter(values: Tensor, guide: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """A(V) with the exact Gaussian kernel; differentiable in the values."""
    return _BilateralFilter.apply(values, guide, sigma_xy, sigma_rgb)


def dense_energy(probabilities: Tensor, guide: Tensor, gate: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """METHOD section 5.5: −Σ S·A(S)·gate / B; differentiable in the probabilities."""
    return _DenseEnergy.apply(probabilities, guide, gate, sigma_xy, sigma_rgb)
