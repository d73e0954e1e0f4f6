"""What the kernel benchmark runs: per operator its inputs at a given size, and the least that it must move and compute.

Bytes are those of compulsory traffic: every input and result crosses the memory bus once. Exps are exponentials and
logarithms, the special-function unit's work. Both are what the formula needs, not what an implementation does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.operators.limits import Cost
from bench.operators.scene import COCO, DEMO, DTYPES, VOC, Scene, Size
from cosa_fast import kernels
from cosa_fast.kernels import reference
from cosa_fast.kernels.launch.offline import ARCHITECTURES

TARGETS = 2  # M' and M†' supervise the same logits
BINS = 256
PARAMETERS = 90_000_000  # ViT-B/16 with its heads
SIGMA_XY, SIGMA_RGB = 50.0, 15.0  # of the energy at half resolution


@dataclass
class Problem:
    """A call to time: the public function with its arguments, the inputs that get a gradient, and its costs."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    forward: Cost
    backward: Cost | None = None  # None: not differentiable
    keywords: dict[str, Any] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def costs(self) -> dict[str, Cost]:
        """The cost of every mode that the operator has."""
        if self.backward is None:
            return {"forward": self.forward}
        return {"forward": self.forward, "backward": self.backward, "both": self.forward + self.backward}


@dataclass(frozen=True)
class Operator:
    """How the benchmark treats an operator. `axes`: the sizes it depends on, and along which it is swept."""

    make: Callable[[Size, Scene], Problem]
    axes: frozenset[str]
    uncompiled: str = ""  # why torch.compile of the reference is not tried

    def problem(self, size: Size, device: torch.device, *, filled: bool = True) -> Problem:
        """The operator's inputs; not `filled`: only allocated, which is all that compiling needs."""
        return self.make(size, Scene(size, device, filled))


def _perplexity(size: Size, scene: Scene) -> Problem:
    shape, dtype = (size.batch, size.resolution, size.resolution), DTYPES[size.dtype]
    values = scene.confidence(size.resolution).to(dtype) if scene.filled else scene.tensor(*shape, dtype=dtype)
    # ν in, P out (float32); one logarithm, as the power is free at β = 1.
    forward = Cost(size.pixels * (size.itemsize + 4), exps=size.pixels, flops=4 * size.pixels)
    # ν and the gradient of P in, dν out.
    backward = Cost(size.pixels * (2 * size.itemsize + 4), exps=size.pixels, flops=6 * size.pixels)
    values.requires_grad_()
    return Problem(kernels.perplexity, (values, scene.threshold()), forward, backward, inputs=[values])


def _fuse_cams(size: Size, scene: Scene) -> Problem:
    cams = scene.an_maps(size.classes)
    sides = (size.resolution, size.resolution)
    # The present classes' maps, image and mirror image, and valid in; ν (float32) and ŷ out.
    maps = 2 * scene.present * sum(grid**2 for grid in size.grids) * size.itemsize
    labels = 4 * size.batch * size.classes
    category = reference.category_type(size.classes).itemsize
    # Per pixel, present class and scale: two bilinear reads of 8, max, relu, sum; for min–max, and for the values.
    flops = 2 * scene.present * size.resolution**2 * len(size.grids) * (2 * 8 + 3)
    cost = Cost(maps + labels + size.pixels * (1 + 4 + category), flops=flops)
    arguments = (cams, scene.labels(), sides, scene.valid(size.resolution))
    return Problem(kernels.fuse_cams, arguments, cost)


def _raw_cross_entropy(size: Size, scene: Scene) -> Problem:
    channels = size.classes + 1
    logits = scene.on_maps(channels)
    targets = 1 if size.variant == "published" else TARGETS
    confidence, category = scene.confidence(size.resolution), scene.category(size.resolution)
    if scene.filled:
        confidence = torch.stack((confidence, confidence**1.5)[:targets])
        category = torch.stack((category, category)[:targets])
    else:
        shape = (targets, *confidence.shape)
        confidence, category = (scene.tensor(*shape, dtype=like.dtype) for like in (confidence, category))
    low = logits.numel() * size.itemsize
    # Logits, T confidences and categories, valid in.
    read = low + size.pixels * (targets * (4 + category.element_size()) + 1)
    # Every pixel: an exponential a channel, the logarithm of their sum, one of eq. 4 a target; each channel
    # interpolated (8 flops), subtracted, summed.
    exps, flops = size.pixels * (channels + 1 + targets), size.pixels * channels * (8 + 2)
    forward = Cost(read, exps=exps, flops=flops)
    # The same recomputed; the gradient of each channel is spread by the same four weights; the logits' gradient out.
    backward = Cost(read + low, exps=exps, flops=flops + size.pixels * channels * (8 + 2))
    arguments = (logits, confidence, category, scene.threshold(targets), scene.valid(size.resolution))
    keywords: dict[str, Any] = {"foreground_weight": 0.5}
    if size.variant == "published":
        keywords |= {"beta": 0.0, "ignore_band": (0.25, 0.7)}
    return Problem(kernels.raw_cross_entropy, arguments, forward, backward, keywords, [logits])


def _seg_to_cam_loss(size: Size, scene: Scene) -> Problem:
    cam = scene.on_maps(size.classes)
    segmentations = scene.an_maps(size.classes + 1)
    sides = (size.resolution, size.resolution)
    cells, terms = size.batch * size.tokens**2, cam.numel()
    channels = scene.present + size.batch  # of all images: the present classes and their backgrounds
    # The CAM, the present channels of S', labels, and the four pixels of valid that a cell reads.
    maps = 2 * channels * sum(grid**2 for grid in size.grids) * size.itemsize
    read = terms * size.itemsize + maps + 4 * size.batch * size.classes + 4 * cells
    # A softmax over the present channels at the four pixels of a cell; exp and log1p a term of the cross entropy.
    target_exps, target_reads = 4 * channels * size.tokens**2, 4 * channels * size.tokens**2 * 2 * len(size.grids)
    forward = Cost(read, exps=target_exps + 2 * terms, flops=8 * target_reads + 5 * terms)
    # The target again, one σ a term, the CAM's gradient out.
    backward = Cost(read + terms * size.itemsize, exps=target_exps + terms, flops=8 * target_reads + 3 * terms)
    arguments = (cam, segmentations, scene.labels(), sides, scene.valid(size.resolution))
    keywords = {"relu": size.variant == "published"}
    return Problem(kernels.seg_to_cam_loss, arguments, forward, backward, keywords, [cam])


def _contrastive_separation(size: Size, scene: Scene) -> Problem:
    cam = scene.on_maps(size.classes)
    category, confidence, valid = scene.category(size.tokens), scene.confidence(size.tokens), scene.valid(size.tokens)
    threshold = scene.threshold()
    positive, negative = _pairs(size, scene, category, confidence, threshold, valid)
    cells, maps = size.batch * size.tokens**2, cam.numel() * size.itemsize
    read = maps + cells * (4 + category.element_size() + 1)  # the CAM, ν, ŷ, valid
    probability = size.variant == "probability"
    channels = size.classes + probability  # with one for the background; σ of the CAM is nothing beside the pairs
    keywords: dict[str, Any] = {"scope": size.scope}
    if probability:
        keywords |= {"vectors": "probability", "image_labels": scene.labels()}
        read += 4 * size.batch * size.classes
    # An inner product a pair; an exponential a negative, softplus (two) a positive pair.
    inner = 2 * channels * (positive + negative)
    forward = Cost(read, exps=negative + 2 * positive, flops=inner)
    # Inner products again, one exponential a pair, the sum of weighted vectors; the CAM's gradient out.
    backward = Cost(read + maps, exps=negative + positive, flops=2 * inner)
    arguments = (cam, category, confidence, threshold, valid)
    return Problem(kernels.contrastive_separation, arguments, forward, backward, keywords, [cam])


def _pairs(
    size: Size, scene: Scene, category: Tensor, confidence: Tensor, threshold: Tensor, valid: Tensor
) -> tuple[int, int]:
    """Ordered positive and negative pairs of Ω; without contents: all tokens, half of their pairs positive."""
    groups = size.batch if size.scope == "image" else 1
    if not scene.filled:
        pairs = groups * (size.batch * size.tokens**2 // groups) ** 2
        return pairs // 2, pairs - pairs // 2
    label, usable = reference.pseudo_labels(confidence, category, threshold, valid, size.classes)
    selected = usable & (reference.perplexity(confidence, threshold) <= 1.0)
    group = torch.arange(size.batch, device=label.device)[:, None, None] * (groups > 1)
    index = (group * (size.classes + 1) + label)[selected]
    counts = torch.bincount(index, minlength=groups * (size.classes + 1)).view(groups, -1)
    same = int(counts.square().sum())
    return same - int(counts.sum()), int(counts.sum(1).square().sum()) - same


def _histogram(size: Size, scene: Scene) -> Problem:
    # ν (float32) and valid in, the counts out.
    cost = Cost(size.pixels * (4 + 1) + 4 * BINS, flops=2 * size.pixels)
    arguments = (scene.confidence(size.resolution), scene.valid(size.resolution), BINS)
    return Problem(kernels.histogram, arguments, cost)


def _fit_mixture(size: Size, scene: Scene) -> Problem:
    centres = (torch.arange(BINS, device=scene.device) + 0.5) / BINS
    modes = [torch.exp(-(((centres - mean) / 0.15) ** 2) / 2) for mean in (0.15, 0.75)]
    counts = (10_000 * torch.stack(modes).sum(0)).round()
    state = torch.tensor([0.4, 0.5, 0.2, 0.7, 0.02, 0.02], device=scene.device)
    # The histogram and the state; a chain of iterations over 256 bins, so latency decides and nothing else counts.
    return Problem(kernels.fit_mixture, (counts, state), Cost(4 * BINS + 2 * 24))


def _adamw_ema_(size: Size, scene: Scene) -> Problem:
    def buffer(dtype: torch.dtype = torch.float32, value: float = 0.0) -> Tensor:
        tensor = scene.tensor(PARAMETERS, dtype=dtype)
        return tensor.fill_(value) if scene.filled else tensor

    state = [buffer(), buffer(DTYPES[size.dtype], 1e-3), buffer(), buffer(value=1e-6), buffer()]
    step, rate = torch.zeros((), dtype=torch.int64, device=scene.device), torch.full((), 6e-5, device=scene.device)
    keywords = {
        "momentum": torch.full((), 0.9994, device=scene.device),
        "parameters_bf16": buffer(torch.bfloat16),
        "ema_bf16": buffer(torch.bfloat16),
    }
    bytes_each = 32 + size.itemsize + 4  # Θ, both moments and Θ' in and out, the gradient in, two bf16 copies out
    if size.variant == "groups":
        keywords["lr_multiplier"] = buffer(value=1.0)
        bytes_each += 4
    cost = Cost(PARAMETERS * bytes_each, flops=15 * PARAMETERS)
    return Problem(kernels.adamw_ema_, (*state, step, rate), cost, keywords=keywords)


def _points(size: Size, scene: Scene) -> tuple[Tensor, Tensor, Cost]:
    """Probabilities (B, K, h, w) and guide (B, 3, h, w) at half resolution, and the cost of one filtering."""
    side, channels = size.resolution // 2, size.classes + 1
    guide = scene.tensor(size.batch, 3, side, side, dtype=torch.float32)
    if scene.filled:
        guide.copy_((220 * scene.blobs(side) + 20 + 5 * scene.noise(*guide.shape)).clamp_(0, 255))
        values = scene.maps(channels, side).softmax(1)
    else:
        values = scene.tensor(size.batch, channels, side, side, dtype=DTYPES[size.dtype])
    pairs = size.batch * side**4
    # Values and guide in; per ordered pair one exponential, five differences squared and summed, K products added.
    cost = Cost(values.numel() * size.itemsize + guide.numel() * 4, exps=pairs, flops=pairs * (2 * 5 + 2 * channels))
    return values.requires_grad_(), guide, cost


def _bilateral_filter(size: Size, scene: Scene) -> Problem:
    values, guide, filtering = _points(size, scene)
    # The filtered values (float32) out; the kernel is symmetric, so the backward filters the gradient.
    forward = filtering + Cost(4 * values.numel())
    arguments = (values, guide, SIGMA_XY, SIGMA_RGB)
    return Problem(kernels.bilateral_filter, arguments, forward, forward, inputs=[values])


def _dense_energy(size: Size, scene: Scene) -> Problem:
    probabilities, guide, filtering = _points(size, scene)
    gate = scene.tensor(size.batch, *guide.shape[2:], dtype=torch.float32)
    if scene.filled:
        gate.fill_(0.5)
    # The gate in, gate·A(S) (float32) kept for the backward, which scales it.
    forward = filtering + Cost(4 * gate.numel() + 4 * probabilities.numel())
    backward = Cost(probabilities.numel() * (4 + size.itemsize), flops=2 * probabilities.numel())
    arguments = (probabilities, guide, gate, SIGMA_XY, SIGMA_RGB)
    return Problem(kernels.dense_energy, arguments, forward, backward, inputs=[probabilities])


UNROLLED = "the loop over tiles of the kernel matrix would be unrolled into thousands of graph nodes"
MAPS = frozenset({"batch", "classes", "resolution", "dtype"})
LOSSES = MAPS | {"published"}
DENSE = frozenset(
    {"classes", "dtype", "dense"}
)  # quadratic in the pixels: measured on few images, not swept over sizes

OPERATORS: dict[str, Operator] = {
    "fuse_cams": Operator(_fuse_cams, MAPS),
    "raw_cross_entropy": Operator(_raw_cross_entropy, LOSSES),
    "seg_to_cam_loss": Operator(_seg_to_cam_loss, LOSSES),
    "contrastive_separation": Operator(_contrastive_separation, MAPS | {"pairs"}),
    "perplexity": Operator(_perplexity, MAPS - {"classes"}),
    "histogram": Operator(_histogram, frozenset({"batch", "resolution"})),
    "fit_mixture": Operator(_fit_mixture, frozenset()),
    "adamw_ema_": Operator(_adamw_ema_, frozenset({"dtype", "groups"})),
    "dense_energy": Operator(_dense_energy, DENSE, UNROLLED),
    "bilateral_filter": Operator(_bilateral_filter, DENSE, UNROLLED),
}

# Sizes along which the operators are swept from VOC's, B = 16 (pairs: over the whole batch, N = 784 to 50 176).
SWEEPS: dict[str, list[Size]] = {
    "batch": [Size(batch=batch) for batch in (1, 2, 4, 8, 16, 32, 64)],
    "classes": [Size(classes) for classes in (20, 80, 300, 1203)],
    "resolution": [Size(resolution=resolution) for resolution in (224, 448, 672, 896)],
    "pairs": [Size(batch=batch, variant="batch") for batch in (1, 4, 16, 64)],
}
WIDE = 1203  # classes of the largest vocabulary in use, LVIS


def base_sizes(name: str, *, quick: bool = False) -> list[Size]:
    """VOC and COCO, B = 4 and 16, bf16 and fp32, as far as the operator depends on them; quick: B = 16 in bf16."""
    axes = OPERATORS[name].axes
    if "dense" in axes:
        return [Size(batch=4, dtype=dtype) for dtype in (("bf16",) if quick else ("bf16", "fp32"))]
    sizes = [
        Size(classes, batch, dtype=dtype)
        for classes in ((VOC, COCO) if "classes" in axes else (VOC,))
        for batch in ((4, 16) if "batch" in axes and not quick else (16,))
        for dtype in (("bf16", "fp32") if "dtype" in axes and not quick else ("bf16",))
    ]
    if "pairs" in axes:  # the paper recipe's vectors
        sizes += [Size(classes, variant="probability") for classes in (VOC, COCO)]
    return sizes + [Size(variant="groups")] * ("groups" in axes)


def static_sizes(name: str, architecture: str, *, quick: bool = False) -> list[Size]:
    """What is compiled without a GPU: VOC, COCO and the widest vocabulary in bf16, as engines run; fp32 at one of them,
    another for each architecture (a kernel differs in its loads only); the demo where block sizes follow the classes.

    The batch is mostly left at 16: a kernel sees of it no more than whether strides are multiples of 16.
    """
    axes = OPERATORS[name].axes
    batch = 4 if "dense" in axes else 16
    if quick:
        return [Size(batch=batch)]
    wide = (WIDE,) if {"classes", "batch"} <= axes else ()
    classes = (VOC, COCO, *wide) if "classes" in axes else (VOC,)
    sizes = [Size(count, batch) for count in classes]
    if "dtype" in axes:
        sizes.append(Size(classes[list(ARCHITECTURES).index(architecture) % len(classes)], batch, dtype="fp32"))
    if axes & {"dense", "pairs"}:
        sizes.append(Size(DEMO, resolution=128))
    sizes += [Size(variant=variant) for variant in ("published", "groups") if variant in axes]
    if "pairs" in axes:
        sizes += [replace(size, variant="probability") for size in sizes]
        sizes += [Size(variant="batch"), Size(batch=64, variant="batch")]
    return sizes


def sweep_sizes(name: str, axis: str) -> list[Size]:
    """The sizes of a sweep; none where the operator does not depend on it."""
    axes = OPERATORS[name].axes
    return SWEEPS[axis] if axis in axes and "dense" not in axes else []
