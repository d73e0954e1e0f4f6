"""Sizes at which the operators are measured, and what training would hand to them at such a size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosa_fast.kernels import reference

STRIDE = 16  # pixels of a token
SCALES = (0.5, 1.0, 1.5)
TOKEN_THRESHOLD = 0.45
VOC, COCO, DEMO = 20, 80, 5  # classes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Size:
    """Images B, classes C, pixels of a side, type of CAMs, logits or gradients.

    Variants: "batch", pairs over the whole batch; "probability", pairs of probability vectors; "published", as the
    published recipes call the losses; "groups", a rate for every parameter, as groups of them need.
    """

    classes: int = VOC
    batch: int = 16
    resolution: int = 448
    dtype: str = "bf16"
    variant: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of a side at scale 1."""
        return self.resolution // STRIDE

    @property
    def grids(self) -> tuple[int, ...]:
        """Tokens of a side at each of AN's scales."""
        return tuple(max(1, round(self.resolution * scale / STRIDE)) for scale in SCALES)

    @property
    def pixels(self) -> int:
        """Pixels of the batch."""
        return self.batch * self.resolution**2

    @property
    def scope(self) -> str:
        """Between which pixels contrastive_separation forms pairs."""
        return "batch" if self.variant == "batch" else "image"

    @property
    def itemsize(self) -> int:
        """Bytes of an element of `dtype`."""
        return DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"C={self.classes} B={self.batch} {self.resolution} {self.dtype} {self.variant}".strip()


class Scene:
    """Inputs as training has them: 1–3 present classes an image, a blob of confidence each, every other image padded.

    All of them follow from the size alone.
    """

    def __init__(self, size: Size, device: torch.device, filled: bool) -> None:
        self.size, self.device, self.filled = size, device, filled
        self._generator = torch.Generator(device).manual_seed(0)

    @property
    def present(self) -> int:
        """Present classes of the whole batch."""
        return sum(1 + image % 3 for image in range(self.size.batch))

    def tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An allocated tensor; on a CPU its pages cost nothing until they are touched."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def noise(self, *shape: int) -> Tensor:
        """Standard normal float32."""
        return torch.randn(shape, generator=self._generator, device=self.device)

    def labels(self) -> Tensor:
        """(B, C) float32."""
        labels = torch.zeros(self.size.batch, self.size.classes, device=self.device)
        classes, filled = self._slots()
        return labels.scatter_add_(1, classes, filled.float()).clamp_(max=1)

    def an_maps(self, channels: int) -> list[Tensor]:
        """Per scale (2B, channels, h_s, w_s): the images' maps, then those of their mirror images."""
        found = []
        for side in self.size.grids:
            maps = self.maps(channels, side)
            found.append(torch.cat((maps, maps.flip(-1))) if self.filled else self._twice(maps))
        return found

    def on_maps(self, channels: int) -> Tensor:
        """(B, channels, h, w), differentiable."""
        return self.maps(channels, self.size.tokens).requires_grad_()

    def confidence(self, side: int) -> Tensor:
        """(B, side, side) float32 in [0, 1]."""
        if not self.filled:
            return self.tensor(self.size.batch, side, side, dtype=torch.float32)
        noisy = self.blobs(side).amax(1) + 0.02 * self.noise(self.size.batch, side, side)
        return torch.where(self.valid(side), noisy.clamp(0, 1), 0)

    def category(self, side: int) -> Tensor:
        """(B, side, side) uint8 (int16 for many classes) in 1..C."""
        if not self.filled:
            return self.tensor(self.size.batch, side, side, dtype=reference.category_type(self.size.classes))
        classes, _ = self._slots()
        best = self.blobs(side).argmax(1)
        category = classes.gather(1, best.flatten(1)).view_as(best) + 1
        return torch.where(self.valid(side), category, 0).to(reference.category_type(self.size.classes))

    def valid(self, side: int) -> Tensor:
        """(B, side, side) bool: every other image is padded on its right."""
        if not self.filled:
            return self.tensor(self.size.batch, side, side, dtype=torch.bool)
        widths = torch.tensor([side - side // 4 * (image % 2) for image in range(self.size.batch)], device=self.device)
        columns = torch.arange(side, device=self.device)
        return (columns < widths[:, None, None]).expand(-1, side, -1).contiguous()

    def threshold(self, count: int | None = None) -> Tensor:
        """ξ on the device: (), or (count,)."""
        return torch.full(() if count is None else (count,), TOKEN_THRESHOLD, device=self.device)

    def _twice(self, maps: Tensor) -> Tensor:
        return self.tensor(2 * len(maps), *maps.shape[1:], dtype=maps.dtype)

    def _slots(self) -> tuple[Tensor, Tensor]:
        """Each image's three class slots (B, 3) int64 and which of them are filled (B, 3) bool."""
        classes, batch = self.size.classes, self.size.batch
        slots = torch.tensor([[(5 * b + k * max(classes // 3, 1)) % classes for k in range(3)] for b in range(batch)])
        filled = torch.arange(3) <= torch.arange(batch)[:, None] % 3
        return slots.to(self.device), filled.to(self.device)

    def blobs(self, side: int) -> Tensor:
        """(B, 3, side, side): a Gaussian bump of height 1 for every filled slot, 0 elsewhere."""
        line = (torch.arange(side, device=self.device) + 0.5) / side
        image = torch.arange(self.size.batch, device=self.device)[:, None, None, None]
        slot = torch.arange(3, device=self.device)[:, None, None]
        row, column = 0.25 + 0.17 * ((image + slot) % 4), 0.2 + 0.3 * slot
        square = (line[:, None] - row) ** 2 + (line - column) ** 2
        return torch.exp(-square / (2 * 0.16**2)) * self._slots()[1][:, :, None, None]

    def maps(self, channels: int, side: int) -> Tensor:
        """(B, channels, side, side) logits in the type of the size; C + 1 channels have the background first."""
        shape = (self.size.batch, channels, side, side)
        if not self.filled:
            return self.tensor(*shape, dtype=DTYPES[self.size.dtype])
        maps, blobs = self.noise(*shape) - 1, self.blobs(side)
        background = channels - self.size.classes
        slots = (self._slots()[0] + background)[:, :, None, None].expand(-1, -1, side, side)
        maps.scatter_add_(1, slots, 6 * blobs)
        if background:
            maps[:, 0] += 3 * (1 - blobs.amax(1))
        return maps.to(DTYPES[self.size.dtype])
