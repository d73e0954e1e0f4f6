"""Some images of one size, what is known of them and what a network says of them: what is counted at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from cosa_fast.evaluation.cam import Slots, Strongest, slots_of
from cosa_fast.evaluation.gathering import must_wait
from cosa_fast.evaluation.inference import of_image

if TYPE_CHECKING:
    from cosa_fast.evaluation.protocol import Protocol
    from cosa_fast.network.model import Outputs


class Part(NamedTuple):
    """N images that are counted together.

    numbers: of the images in their batch; positions: among all those evaluated. slots: the classes that they are known
    to show; labels: the same, (N, C) bool on the CPU. truth: (N, H, W), their masks.
    """

    numbers: range
    positions: Sequence[int]
    slots: Slots
    labels: Tensor
    truth: Tensor


def parts_of(positions: Sequence[int], labels: Tensor, truths: Tensor) -> list[Part]:
    """A batch in parts: a GPU takes all of it at once, on a CPU the maps of one image fit into the caches. labels:
    (N, C) bool on the CPU; truths: (N, H, W) where the maps will be."""
    device, count = truths.device, len(positions)
    ranges = [range(count)] if must_wait(device) else [range(number, number + 1) for number in range(count)]
    parts = []
    for numbers in ranges:
        rows = slice(numbers.start, numbers.stop)
        slots = slots_of(labels[rows]).to(device)
        parts.append(Part(numbers, positions[rows], slots, labels[rows], truths[rows]))
    return parts


class Seen:
    """What a network says of the N images of a part. outputs: of its batch by scale, the flipped images behind the
    others where there are any; batch: images in it."""

    def __init__(self, part: Part, outputs: dict[float, Outputs], batch: int) -> None:
        whole = len(part.numbers) == batch
        self.part = part
        self._outputs = outputs if whole else of_image(outputs, part.numbers.start, batch)

    def __len__(self) -> int:
        return len(self.part.numbers)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.part.truth.shape[1], self.part.truth.shape[2]

    def _rows(self, maps: Tensor, flip: bool) -> Tensor:
        """All rows, or without flip those of the images themselves (segmentation and CAMs may differ in what they
        flip)."""
        return maps if flip else maps[: len(self)]

    def segmentations(self, scales: Sequence[float], flip: bool) -> list[Tensor]:
        """The segmentation logits of each scale."""
        return [self._rows(self._outputs[scale].segmentation(), flip) for scale in scales]

    def logits(self, protocol: Protocol) -> list[Tensor]:
        """The classifier's, of each of its scales."""
        return [self._rows(self._outputs[scale].logits, protocol.cam_flip) for scale in protocol.score_scales]

    def cams(self, protocol: Protocol) -> dict[str, list[Tensor]]:
        """The CAMs of each scale: "cam" and, with an auxiliary head, "cam_aux"."""
        heads = {"cam": [self._outputs[scale].cam for scale in protocol.cam_scales]}
        aux = [maps for scale in protocol.aux_scales if (maps := self._outputs[scale].cam_aux) is not None]
        if aux:
            heads["cam_aux"] = aux
        return {name: [self._rows(maps, protocol.cam_flip) for maps in each] for name, each in heads.items()}

    def strongest(
        self, cams: dict[str, list[Tensor]], slots: Slots, protocol: Protocol
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """ν and ŷ, (N, H, W) each, of the maps of each head; for both heads also of the mean of their maps, as
        "ensemble"."""
        found = {name: Strongest() for name in (*cams, *(["ensemble"] if len(cams) > 1 else []))}
        for group in slots.groups(self.size[0] * self.size[1]):
            maps = {name: protocol.maps(each, group.classes, self.size) for name, each in cams.items()}
            if len(cams) > 1:
                maps["ensemble"] = (maps["cam"] + maps["cam_aux"]) / 2
            for name, each in maps.items():
                found[name].add(each, group)
        return {name: each.maps() for name, each in found.items()}
