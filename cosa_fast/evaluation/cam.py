"""The per-class CAMs of images: fuse_cams before its maximum over classes.

Training never needs these maps. Evaluation does: the ensemble (M' + M†')/2 averages per class before the maximum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cosa_fast.data_pipeline.batch import ignored, sent
from cosa_fast.evaluation.gathering import must_wait
from cosa_fast.kernels import reference
from cosa_fast.kernels.reference.common import present_slots

# Maps at full resolution exist for so many values at most; one map of each image at least.
MAP_VALUES = 1 << 24


class Slots(NamedTuple):
    """Classes of N images in P slots each. classes: (N, P) int64 in 0..C-1, ascending; filled: (N, P) bool, the slots
    that count."""

    classes: Tensor
    filled: Tensor

    def to(self, device: torch.device) -> Slots:
        return Slots(*(sent(each, device) for each in self))

    def groups(self, pixels: int) -> Iterator[Slots]:
        """The slots in parts whose maps of `pixels` pixels hold MAP_VALUES values at most, or one map an image."""
        images, slots = self.classes.shape
        step = max(1, MAP_VALUES // (images * pixels))
        for start in range(0, slots, step):
            yield Slots(*(each[:, start : start + step] for each in self))


def slots_of(labels: Tensor) -> Slots:
    """The classes that labels (N, C) bool name. On a CPU as many slots as the image with most of them needs; on a GPU
    all C, as the host would have to wait to know how many these are."""
    if must_wait(labels.device):
        return Slots(torch.arange(labels.shape[1], device=labels.device).expand_as(labels), labels)
    return Slots(*present_slots(labels))


def normalised_cams(cams: Sequence[Tensor], classes: Tensor, size: tuple[int, int]) -> Tensor:
    """M' (METHOD section 3) of some classes of each image.

    cams: one per scale, (2N, C, h_s, w_s) raw CAMs, rows N.. computed on the flipped images, or (N, C, h_s, w_s).
    classes: (N, P) integer class indices in 0..C-1. size: (H, W).
    Returns (N, P, H, W) float32 in [0, 1]: flip-max, ReLU, sum over scales, min–max per image and class.
    """
    image = torch.arange(len(classes), device=classes.device)[:, None].expand_as(classes)
    maps = reference.class_maps(cams, len(classes), image.flatten(), classes.flatten(), size)
    return maps.view(*classes.shape, *size)


class Strongest:
    """Confidence ν and category ŷ of N images, out of their maps class by class."""

    def __init__(self) -> None:
        self._found: tuple[Tensor, Tensor] | None = None

    def add(self, maps: Tensor, slots: Slots) -> None:
        """Some of the classes, (N, P, H, W), higher ones than those before."""
        values, place = maps.masked_fill(~slots.filled[..., None, None], -1.0).max(1)
        category = slots.classes.gather(1, place.flatten(1)).view_as(place) + 1
        if self._found is not None:
            best, best_category = self._found
            better = (values > best) | values.isnan()
            values, category = torch.where(better, values, best), torch.where(better, category, best_category)
        self._found = values, category

    def maps(self) -> tuple[Tensor, Tensor]:
        """(N, H, W) float32, and int64 in 1..C; both 0 in an image without a class."""
        assert self._found is not None
        confidence, category = self._found
        empty = confidence < 0
        return confidence.masked_fill(empty, 0), category.masked_fill(empty, 0)


def strongest(maps: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """ν and ŷ of the (P, H, W) maps of one image, present: (P,), their classes in 0..C-1: (H, W) float32, and int64 in
    1..C; both 0 if P = 0."""
    if len(present) == 0:
        zeros = torch.zeros(maps.shape[1:], device=maps.device)
        return zeros, zeros.long()
    found = Strongest()
    found.add(maps[None], Slots(present[None], torch.ones_like(present, dtype=torch.bool)[None]))
    confidence, category = found.maps()
    return confidence[0], category[0]


def classes_in(mask: Tensor) -> Tensor:
    """(P,) int64 indices in 0..C-1 of the foreground classes in a mask (H, W): the image's true label."""
    occurs = torch.bincount(mask[~ignored(mask)].long(), minlength=1) > 0
    return occurs[1:].nonzero()[:, 0]
