"""The assignment network (AN): the moving average of the online network, and the pseudo-labels it hands out (METHOD
section 3)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.config.schema import TeacherConfig
from cosa_fast.kernels import fuse_cams
from cosa_fast.network.model import CoSANet, Outputs
from cosa_fast.network.resizing import resize_to_stride


@dataclass
class Assignment:
    """What AN gives ON to learn from: the maps of its T layers, M' and, with an auxiliary head, M†', and S'.

    confidence, category: ν float32 and ŷ uint8 (0: no class present) on the pixel grid, (T, B, H, W).
    grid_confidence, grid_category: the same on the token grid, (T, B, h, w).
    grid_valid: (B, h, w) bool, the valid cells of the token grid.
    seg_logits: S' per scale, (2B, K, h_s, w_s), rows B.. from the mirrored images.
    """

    confidence: Tensor
    category: Tensor
    grid_confidence: Tensor
    grid_category: Tensor
    grid_valid: Tensor
    seg_logits: list[Tensor]

    @classmethod
    def join(cls, parts: Sequence["Assignment"]) -> "Assignment":
        """That of the whole batch from those of its parts, in order."""
        if len(parts) == 1:
            return parts[0]
        halves = [[logits.chunk(2) for logits in scale] for scale in zip(*(p.seg_logits for p in parts), strict=True)]
        return cls(
            confidence=torch.cat([part.confidence for part in parts], 1),
            category=torch.cat([part.category for part in parts], 1),
            grid_confidence=torch.cat([part.grid_confidence for part in parts], 1),
            grid_category=torch.cat([part.grid_category for part in parts], 1),
            grid_valid=torch.cat([part.grid_valid for part in parts]),
            seg_logits=[torch.cat([pair[side] for side in (0, 1) for pair in scale]) for scale in halves],
        )


def assign(
    outputs: Sequence[Outputs],
    labels: Tensor,
    valid: Tensor,
    stride: int,
    backend: str = "auto",
    *,
    aux_scales: str = "all",
    half_grid: bool = False,
) -> Assignment:
    """Pseudo-labels out of AN's outputs, one per scale, rows B.. from the mirrored images.

    labels (B, C); valid (B, H, W) bool; stride: pixels per cell of the token grid; aux_scales, half_grid: as
    teacher.aux_scales and threshold.grid say.
    """
    size = (valid.shape[1], valid.shape[2])
    grid = (size[0] // stride, size[1] // stride)
    grid_valid = valid_on_grid(valid, grid)
    layers = [[output.cam for output in outputs]]
    aux = [output.cam_aux for output in outputs if output.cam_aux is not None]
    if aux:
        layers.append(aux if aux_scales == "all" else aux[-1:])
    # To fuse_cams, layers of as many scales are one larger batch, so that the results need no stacking.
    batches = [_as_batch(layers)] if len({len(layer) for layer in layers}) == 1 else layers

    def fused(size: tuple[int, int], valid: Tensor) -> tuple[Tensor, Tensor]:
        """ν and ŷ of all layers, (T, B, H, W)."""
        maps = []
        for cams in batches:
            count = cams[0].shape[0] // (2 * len(labels))
            maps.append(fuse_cams(cams, labels.repeat(count, 1), size, valid.repeat(count, 1, 1), backend=backend))
        confidence, category = (torch.cat(each).unflatten(0, (len(layers), -1)) for each in zip(*maps, strict=True))
        return confidence, category

    pixels = fused(size, valid)
    if half_grid:
        pixels = _of_half_resolution(*pixels)
    return Assignment(*pixels, *fused(grid, grid_valid), grid_valid, [output.segmentation() for output in outputs])


def _of_half_resolution(confidence: Tensor, category: Tensor) -> tuple[Tensor, Tensor]:
    """ν and ŷ (T, B, H, W), reduced to half of each side, a mean of four and the first of four, and enlarged again,
    bilinear and nearest."""
    halved = F.avg_pool2d(confidence, 2)
    enlarged = F.interpolate(halved, size=confidence.shape[2:], mode="bilinear", align_corners=False)
    return enlarged, category[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)


def valid_on_grid(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """valid (B, H, W) bool on the token grid (B, h, w): a cell is valid if at least half of its pixels are."""
    return F.adaptive_avg_pool2d(valid.float(), grid) >= 0.5


def _as_batch(layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """M and, where there is one, M† of each scale as one batch: (2·T·B, C, h_s, w_s), the mirrored images behind."""
    if len(layers) == 1:
        return list(layers[0])
    scales = ([maps.chunk(2) for maps in scale] for scale in zip(*layers, strict=True))
    return [torch.cat([halves[side] for side in (0, 1) for halves in scale]) for scale in scales]


class AssignmentNetwork:
    """AN: a copy of the online network whose weights follow Θ' ← mΘ' + (1 − m)Θ; it gets no gradient.

    `master` is the float32 network, `compute` what its forward pass runs: the same, or a copy of it in another type
    that the engine keeps equal.
    """

    def __init__(
        self, online: CoSANet, config: TeacherConfig, backend: str = "auto", *, half_grid: bool = False
    ) -> None:
        self._config = config
        self._half_grid = half_grid
        self._backend = backend
        self._online = online
        self.master = copy.deepcopy(online).eval().requires_grad_(False)
        self.compute = self.master

    @cached_property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(own, ON's) tensors. Matched at the first update, when both networks have their final memory."""
        own, online = self.master.state_dict(keep_vars=True), self._online.state_dict(keep_vars=True)
        return [(own[name].detach(), online[name].detach()) for name in own]

    @torch.no_grad()
    def update(self) -> None:
        """One step of the moving average over parameters and buffers; integer buffers are copied."""
        floating = [(own, online) for own, online in self._pairs if own.is_floating_point()]
        torch._foreach_lerp_(
            [own for own, _ in floating], [online for _, online in floating], 1 - self._config.momentum
        )
        for own, online in self._pairs:
            if not own.is_floating_point():
                own.copy_(online)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Outputs]:
        """Outputs per scale for the weak views (B, 3, H, W), rows B.. from the mirrored images.

        Without teacher.flip their place is taken by the mirrored maps of the images themselves, so that maxima stay and
        the temperature of the summed logits keeps its meaning.
        """
        rows = [self._rows(images, scale) for scale in self._config.scales]
        packed = self.compute.is_packed
        outputs = self.compute.forward_packed(rows) if packed else [self.compute(each) for each in rows]
        if self._config.flip:
            return outputs
        return [Outputs._make(None if item is None else _with_mirror(item) for item in each) for each in outputs]

    @torch.no_grad()
    def assign(self, outputs: Sequence[Outputs], labels: Tensor, valid: Tensor) -> Assignment:
        """Pseudo-labels out of what `forward` gave, for labels (B, C) and valid (B, H, W) bool."""
        return assign(
            outputs,
            labels,
            valid,
            self.master.stride,
            self._backend,
            aux_scales=self._config.aux_scales,
            half_grid=self._half_grid,
        )

    def _rows(self, images: Tensor, scale: float) -> Tensor:
        """What the network receives at a scale."""
        scaled = resize_to_stride(images, scale, self.master.stride).to(self.compute.dtype)
        return torch.cat([scaled, scaled.flip(-1)]) if self._config.flip else scaled


def _with_mirror(maps: Tensor) -> Tensor:
    return torch.cat([maps, maps.flip(-1)]) if maps.dim() == 4 else torch.cat([maps, maps])
