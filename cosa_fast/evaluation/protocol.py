"""How an evaluation shows images to a network, and how its maps come back to their size (METHOD section 7).

native: images at their own size; every map is enlarged to it once. squashed, as the official release: images at the
training crop's size, maps summed there and then brought to the image's own; CAMs of all scales of the evaluation, cut
at a fixed 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.evaluation.cam import normalised_cams
from cosa_fast.evaluation.inference import summed_logits_of

# What the squashed protocol calls foreground.
FIXED_THRESHOLD = 0.5
Thresholds = tuple[float | None, float | None]


class Protocol:
    """The native one. `cam_scales`: the scales of M', none for a standalone network; `cam_flip`: whether it sees
    mirrored images; `aux_scales`: the scales of M†'; `score_scales`: those of the classifier."""

    def __init__(self, config: Config) -> None:
        standalone = config.model.standalone
        self.cam_scales = () if standalone else config.teacher.scales
        self.cam_flip = config.eval.flip if standalone else config.teacher.flip
        self.score_scales = config.eval.scales if standalone else config.teacher.scales
        self._last_aux = config.teacher.aux_scales == "last"

    @property
    def aux_scales(self) -> tuple[float, ...]:
        return self.cam_scales[-1:] if self._last_aux else self.cam_scales

    def images(self, images: Tensor) -> Tensor:
        """(N, 3, H, W), normalised, as scale 1 of the network shows them."""
        return images

    def logits(self, segs: Sequence[Tensor], images: int, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """The summed segmentation logits of N = `images` images on their grid, as `summed_logits_of` gives them."""
        return summed_logits_of(segs, images, size)

    def maps(self, cams: Sequence[Tensor], classes: Tensor, size: tuple[int, int]) -> Tensor:
        """M' (N, P, H, W) of (N, P) classes on the images' grid, as `normalised_cams` gives it."""
        return normalised_cams(cams, classes, size)

    def thresholds(self, own: Thresholds) -> Thresholds:
        """At which CAMs are scored besides their best ones, from the run's own."""
        return own


class Squashed(Protocol):
    """The release's, at sides of `side` pixels."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.cam_scales = () if config.model.standalone else config.eval.scales
        self.cam_flip = config.eval.flip
        self.score_scales = config.eval.scales
        self._size = (config.data.crop_size, config.data.crop_size)

    def images(self, images: Tensor) -> Tensor:
        return F.interpolate(images, size=self._size, mode="bilinear", align_corners=False)

    def logits(self, segs: Sequence[Tensor], images: int, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        square = torch.cat([logits for _, logits in summed_logits_of(segs, images, self._size)], dim=2)
        return summed_logits_of([square], images, size)

    def maps(self, cams: Sequence[Tensor], classes: Tensor, size: tuple[int, int]) -> Tensor:
        square = normalised_cams(cams, classes, self._size)
        if classes.shape[1] == 0:
            return square.new_zeros(*classes.shape, *size)
        return F.interpolate(square, size=size, mode="bilinear", align_corners=False)

    def thresholds(self, own: Thresholds) -> Thresholds:
        return FIXED_THRESHOLD, FIXED_THRESHOLD


def protocol_of(config: Config) -> Protocol:
    """The one that eval.protocol names."""
    return Squashed(config) if config.eval.protocol == "squashed" else Protocol(config)
