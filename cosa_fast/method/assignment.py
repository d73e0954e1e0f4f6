"""The assignment network (AN): the moving average of the online network, and the pseudo-labels it hands out (METHOD
section 3)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.config.schema import TeacherConfig
from cosa_fast.kernels import fuse_cams
from cosa_fast.network.model import CoSANet, Outputs


@dataclass
class AssignedMaps:
    """M' of one layer: ν and ŷ on the pixel grid (B, H, W) and on the token grid (B, h, w). Categories are uint8, 0 =
    no class present."""

    confidence: Tensor
    category: Tensor
    grid_confidence: Tensor
    grid_category: Tensor

    @classmethod
    def join(cls, parts: Sequence["AssignedMaps"]) -> "AssignedMaps":
        """Those of the whole batch from those of its parts, in order."""
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass
class Assignment:
    """What AN gives ON to learn from: maps of M', of M†' (None without auxiliary head), and S' per scale, (2B, K,
    h_s, w_s)."""

    cam: AssignedMaps
    cam_aux: AssignedMaps | None
    seg_logits: list[Tensor]

    @classmethod
    def join(cls, parts: Sequence["Assignment"]) -> "Assignment":
        """That of the whole batch from those of its parts, in order."""
        if len(parts) == 1:
            return parts[0]
        aux = [part.cam_aux for part in parts if part.cam_aux is not None]
        halves = [[logits.chunk(2) for logits in scale] for scale in zip(*(p.seg_logits for p in parts), strict=True)]
        return cls(
            AssignedMaps.join([part.cam for part in parts]),
            AssignedMaps.join(aux) if aux else None,
            [torch.cat([pair[side] for side in (0, 1) for pair in scale]) for scale in halves],
        )


class AssignmentNetwork:
    """A copy of the online network whose weights follow Θ' ← mΘ' + (1 − m)Θ; it gets no gradient."""

    def __init__(self, student: CoSANet, config: TeacherConfig, backend: str = "auto") -> None:
        self._config = config
        self._backend = backend
        self.model = copy.deepcopy(student).eval().requires_grad_(False)
        if config.attention != "sdpa":
            self.model.encoder.pack(config.attention)
        # What the forward pass runs: the model itself, or a copy of it in another type that somebody keeps equal.
        self.compute = self.model
        self._student = student

    @cached_property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(own, ON's) tensors. Matched at the first update, when both networks have their final memory."""
        own, online = self.model.state_dict(keep_vars=True), self._student.state_dict(keep_vars=True)
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
    def assign(self, images: Tensor, labels: Tensor, valid: Tensor) -> Assignment:
        """Pseudo-labels for the weak views: images (B, 3, H, W), labels (B, C), valid (B, H, W) bool."""
        outputs = self._forward(images)
        size = (images.shape[2], images.shape[3])
        stride = self.model.stride
        grid = (size[0] // stride, size[1] // stride)

        def fused(cams: list[Tensor]) -> AssignedMaps:
            return AssignedMaps(
                *fuse_cams(cams, labels, size, valid, backend=self._backend),
                *fuse_cams(cams, labels, grid, valid_on_grid(valid, grid), backend=self._backend),
            )

        cams_aux = [output.cam_aux for output in outputs if output.cam_aux is not None]
        return Assignment(
            cam=fused([output.cam for output in outputs]),
            cam_aux=fused(cams_aux) if cams_aux else None,
            seg_logits=[output.segmentation() for output in outputs],
        )

    def _forward(self, images: Tensor) -> list[Outputs]:
        """Outputs for [images; flipped images] at each scale. Without the flip its place is taken by the mirrored
        maps of the images themselves, so that maxima stay and the temperature of the summed logits keeps its
        meaning."""
        rows = [self._rows(images, scale) for scale in self._config.scales]
        packed = self._config.attention != "sdpa"
        outputs = self.compute.forward_packed(rows) if packed else [self.compute(each) for each in rows]
        if self._config.flip:
            return outputs
        return [Outputs._make(None if item is None else _with_mirror(item) for item in each) for each in outputs]

    def _rows(self, images: Tensor, scale: float) -> Tensor:
        """What the network receives at a scale."""
        scaled = resize_to_stride(images, scale, self.model.stride).to(next(self.compute.parameters()).dtype)
        return torch.cat([scaled, scaled.flip(-1)]) if self._config.flip else scaled


def resize_to_stride(images: Tensor, scale: float, stride: int) -> Tensor:
    """Images (B, 3, H, W) at about `scale`, each side the nearest multiple of `stride`; bilinear,
    align_corners=False."""
    height, width = (max(stride, round(side * scale / stride) * stride) for side in images.shape[2:])
    if (height, width) == tuple(images.shape[2:]):
        return images
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


def valid_on_grid(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """valid (B, H, W) bool on the token grid (B, h, w): a cell is valid if at least half of its pixels are."""
    return F.adaptive_avg_pool2d(valid.float(), grid) >= 0.5


def _with_mirror(maps: Tensor) -> Tensor:
    return torch.cat([maps, maps.flip(-1)]) if maps.dim() == 4 else torch.cat([maps, maps])
