"""Multi-scale, flipped inference on images of any size: what evaluation, prediction and the gallery share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosa_fast.network.build import SegmentationNetwork
from cosa_fast.network.model import Outputs
from cosa_fast.network.resizing import resize_to_stride

# Full-resolution logits exist for one band of rows at a time: at most this many values.
BAND_VALUES = 1 << 24


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; on leaving, each module gets its own mode back (frozen batch norm)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def forward_scales(
    model: SegmentationNetwork,
    images: Tensor,
    scales: Iterable[float],
    *,
    flip: bool,
    seg_scales: Iterable[float],
    dtype: torch.dtype = torch.float32,
) -> dict[float, Outputs]:
    """One forward per scale on [images; flipped images].

    images: (N, 3, H, W) normalised. flip: whether rows N.., the flipped images, are computed.
    seg_scales: the scales at which the decoder runs; elsewhere Outputs.seg is None. dtype: of the network's matrix
    products (torch.autocast).
    """
    wanted = set(seg_scales)
    outputs = {}
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        for scale in dict.fromkeys(scales):
            scaled = resize_to_stride(images, scale, model.stride)
            rows = torch.cat([scaled, scaled.flip(-1)]) if flip else scaled
            outputs[scale] = model(rows, seg=scale in wanted)
    return outputs


def of_image(outputs: dict[float, Outputs], number: int, count: int) -> dict[float, Outputs]:
    """The part of `forward_scales` that belongs to one of `count` images: row 0, and row 1 of the flipped one if there
    are flipped ones.
    """

    def part(output: Outputs) -> Outputs:
        values: list[Any] = [None if value is None else value[number::count] for value in output]
        return Outputs(*values)

    return {scale: part(output) for scale, output in outputs.items()}


def summed_logits(segs: Sequence[Tensor], size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """The segmentation logits, summed over scales and flips on the (H, W) = size grid, band of rows after band of rows.

    segs: one per scale, (2, K, h_s, w_s), row 1 from the flipped image, or (1, K, h_s, w_s).
    Yields (rows, (K, rows, W) float32). Both flips share one interpolation, which is linear; bands bound the memory.
    """
    wide = [_interpolate_width(seg[0] if len(seg) == 1 else seg[0] + seg[1].flip(-1), size[1]) for seg in segs]
    height = max(1, BAND_VALUES // (wide[0].shape[0] * size[1]))
    for start in range(0, size[0], height):
        rows = slice(start, min(start + height, size[0]))
        total = _interpolate_rows(wide[0], rows, size[0])
        for each in wide[1:]:
            total += _interpolate_rows(each, rows, size[0])
        yield rows, total


def class_probabilities(segs: Sequence[Tensor], size: tuple[int, int], allowed: Tensor | None = None) -> Tensor:
    """(K, H, W) float32: softmax of the mean of the logits that `summed_logits` sums, over the `allowed` ((K,) bool)
    classes; 0 for others. For what needs probabilities: the argmax alone wants less memory."""
    maps = sum(len(seg) for seg in segs)
    bands = []
    for _, logits in summed_logits(segs, size):
        logits = logits / maps
        if allowed is not None:
            logits = logits.masked_fill(~allowed[:, None, None], float("-inf"))
        bands.append(logits.softmax(0))
    return torch.cat(bands, 1)


def _interpolate_width(maps: Tensor, width: int) -> Tensor:
    """(K, h, w) -> (K, h, width) float32."""
    return F.interpolate(maps[None].float(), size=(maps.shape[1], width), mode="bilinear", align_corners=False)[0]


def _interpolate_rows(maps: Tensor, rows: slice, height: int) -> Tensor:
    """Rows `rows` of the (K, h, W) maps brought to `height` rows: bilinear, align_corners=False."""
    position = torch.arange(rows.start, rows.stop, device=maps.device, dtype=torch.float32) + 0.5
    source = (position * (maps.shape[1] / height) - 0.5).clamp(0, maps.shape[1] - 1)
    above = source.floor().long()
    below = (above + 1).clamp(max=maps.shape[1] - 1)
    return torch.lerp(maps[:, above], maps[:, below], (source - above)[:, None])


def allowed_classes(present: Tensor, num_classes: int) -> Tensor:
    """(K,) bool for `best_class`: the background and the present classes ((P,) integer in 0..C-1)."""
    allowed = torch.zeros(num_classes, dtype=torch.bool, device=present.device)
    allowed[0] = True
    allowed[present + 1] = True
    return allowed


def best_class(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """argmax over the K rows of (K, ...) logits, among the `allowed` ((K,) bool) ones only."""
    if allowed is None:
        return logits.argmax(0)
    candidates = allowed.nonzero()[:, 0]
    return candidates[logits[candidates].argmax(0)]
