"""All that one network says of one image: classes, CAMs, segmentation. Pictures and `predict --what` are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.views.pixels import normalise
from cosa_fast.device import compute_type
from cosa_fast.evaluation.cam import strongest
from cosa_fast.evaluation.image_labels import predicted_labels
from cosa_fast.evaluation.inference import allowed_classes, best_class, forward_scales, inference, summed_logits
from cosa_fast.evaluation.protocol import Protocol
from cosa_fast.network.build import SegmentationNetwork
from cosa_fast.network.model import Outputs


@dataclass(frozen=True)
class Seen:
    """Tensors on the CPU, maps at the size of the image.

    scores: (C,) float32, the classifier's logits, mean over scales and flips. present: (P,) int64 in 0..C-1, the
    classes that the CAMs are gated by. cams: M' and, with an auxiliary head, M†': (P, H, W) float32 in [0, 1] each;
    none where they were not asked for, or
    the network has no CAM. segmentation: (H, W) in 0..C, uint8, int16 for more than 254 classes. logits:
    (K, H, W) float32, summed over `maps` maps (scales, flips), where they were asked for.
    """

    scores: Tensor
    present: Tensor
    cams: tuple[Tensor, ...]
    segmentation: Tensor
    logits: Tensor | None
    maps: int

    def strongest(self, which: int = 0) -> tuple[Tensor, Tensor]:
        """ν (H, W) float32 and ŷ (H, W) int64 in 0..C of M' (0) or M†' (1)."""
        return strongest(self.cams[which], self.present)

    def require_logits(self) -> Tensor:
        """`logits`, where they were asked for."""
        if self.logits is None:
            raise ValueError("logits: see() was not asked for them, want with_logits=True")
        return self.logits

    def ensemble(self) -> Tensor:
        """(M' + M†')/2; M' where there is no auxiliary head."""
        return torch.stack(self.cams).mean(0)


def see(
    network: SegmentationNetwork,
    config: Config,
    image: Image.Image,
    present: Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
    scales: Sequence[float] | None = None,
    label_aware: bool = False,
    with_cams: bool = True,
    with_logits: bool = False,
) -> Seen:
    """What a network sees in an RGB image. No gradient is recorded.

    present: (P,) int64 in 0..C-1; None: the classes that the classifier itself finds. size: (H, W) of the maps; None:
    that of the image. scales: of the segmentation; None: those of the evaluation. label_aware: the segmentation may
    only use background and `present`. with_cams: also at the scales of the teacher section; else the scores are those
    of the segmentation's scales.
    """
    protocol, flip = Protocol(config), config.eval.flip
    with_cams = with_cams and bool(protocol.cam_scales)
    scales, size = scales or config.eval.scales, size or (image.height, image.width)
    device = next(network.parameters()).device
    pixels = normalise(image, config.data.mean, config.data.std).to(device)[None]
    own = protocol.cam_scales if with_cams else tuple(scales)
    with inference(network):
        outputs = forward_scales(
            network,
            pixels,
            (*own, *scales),
            flip=protocol.cam_flip or flip,
            seg_scales=scales,
            dtype=compute_type(config.run.precision, device),
        )
        rows = slice(None) if protocol.cam_flip else slice(1)
        scores = torch.cat([outputs[scale].logits[rows] for scale in own])
        present = predicted_labels([scores], 1)[0].nonzero()[:, 0] if present is None else present.to(device)
        heads = _heads(outputs, protocol, rows) if with_cams else []
        cams = tuple(protocol.maps(head, present[None], size)[0].cpu() for head in heads)
        segs = [outputs[scale].segmentation()[slice(None) if flip else slice(1)] for scale in scales]
        allowed = allowed_classes(present, segs[0].shape[1]) if label_aware else None
        segmentation = torch.empty(size, dtype=torch.uint8 if segs[0].shape[1] <= 255 else torch.int16)
        logits = torch.empty(segs[0].shape[1], *size) if with_logits else None
        for band, values in summed_logits(segs, size):
            segmentation[band] = best_class(values, allowed).to("cpu", segmentation.dtype)
            if logits is not None:
                logits[:, band] = values.cpu()
    maps = sum(len(seg) for seg in segs)
    return Seen(scores.float().mean(0).cpu(), present.cpu(), cams, segmentation, logits, maps)


def _heads(outputs: dict[float, Outputs], protocol: Protocol, rows: slice) -> list[list[Tensor]]:
    """The CAMs of the scales of M', then those of M†' where there is an auxiliary head."""
    aux = [cam[rows] for scale in protocol.aux_scales if (cam := outputs[scale].cam_aux) is not None]
    return [[outputs[scale].cam[rows] for scale in protocol.cam_scales], *([aux] if aux else [])]
