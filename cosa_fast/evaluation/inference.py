"""Multi-scale, flipped inference on images of any size: what evaluation, prediction and the gallery share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosa_fast.evaluation.cam import Slots
from cosa_fast.evaluation.gathering import must_wait
from cosa_fast.network.attention_backends import any_size
from cosa_fast.network.build import SegmentationNetwork
from cosa_fast.network.model import Outputs
from cosa_fast.network.resizing import resize_to_stride
from cosa_fast.network.rotary import passing_sizes
from cosa_fast.network.standalone import StandaloneNet

# Full-resolution logits exist for one band of rows at a time: at most this many values.
BAND_VALUES = 1 << 24
# Below so many pixels, of all scales and flips together, one scale alone is too small for a GPU, and one pass over all
# of them is half of the launches. Above, its activations would only take more memory.
ONE_PASS_PIXELS = 1 << 23


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; on leaving, each module gets its own mode back (frozen batch norm), and
    nothing is kept for the sizes of the images."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), passing_sizes(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_one_pass(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a plain ViT on a GPU can take all scales in one pass; on leaving it attends as before."""
    encoder = getattr(model, "encoder", None)
    before = None if encoder is None or encoder.packs else encoder.attention
    if encoder is None or before is None or not must_wait(device):
        yield
        return
    encoder.attend("packed")
    try:
        yield
    finally:
        encoder.attend(before)


def scaled_rows(images: Tensor, scales: Iterable[float], *, flip: bool, stride: int) -> dict[float, Tensor]:
    """[images; flipped images] at each scale, as a network of that stride takes them. images: (N, 3, H, W), normalised.
    flip: whether there are rows N.., the flipped images."""
    rows = {}
    for scale in dict.fromkeys(scales):
        scaled = resize_to_stride(images, scale, stride)
        rows[scale] = torch.cat([scaled, scaled.flip(-1)]) if flip else scaled
    return rows


def forward_rows(
    model: SegmentationNetwork,
    rows: Mapping[float, Tensor],
    seg_scales: Iterable[float],
    dtype: torch.dtype = torch.float32,
) -> dict[float, Outputs]:
    """A network's outputs for what `scaled_rows` gives; arguments as of `forward_scales`. All scales of a few images go
    through a network in one pass where it is packed, for training (teacher.attention) or by `in_one_pass`."""
    wanted = set(seg_scales)
    device = next(iter(rows.values())).device
    pixels = sum(len(each) * each.shape[2] * each.shape[3] for each in rows.values())
    products = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    with products, any_size():
        if not isinstance(model, StandaloneNet) and model.is_packed and pixels <= ONE_PASS_PIXELS:
            outputs = model.forward_packed(list(rows.values()), [scale in wanted for scale in rows], keep=False)
            return dict(zip(rows, outputs, strict=True))
        return {scale: model(each, seg=scale in wanted) for scale, each in rows.items()}


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
    return forward_rows(model, scaled_rows(images, scales, flip=flip, stride=model.stride), seg_scales, dtype)


def of_image(outputs: dict[float, Outputs], number: int, count: int) -> dict[float, Outputs]:
    """The part of `forward_scales` that belongs to one of `count` images: row 0, and row 1 of the flipped one if there
    are flipped ones.
    """

    def part(output: Outputs) -> Outputs:
        values: list[Any] = [None if value is None else value[number::count] for value in output]
        return Outputs(*values)

    return {scale: part(output) for scale, output in outputs.items()}


def summed_logits(segs: Sequence[Tensor], size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """The segmentation logits of one image, summed over scales and flips on the (H, W) = size grid, band of rows after
    band of rows.

    segs: one per scale, (2, K, h_s, w_s), row 1 from the flipped image, or (1, K, h_s, w_s).
    Yields (rows, (K, rows, W) float32). Both flips share one interpolation, which is linear; bands bound the memory.
    """
    for rows, logits in summed_logits_of(segs, 1, size):
        yield rows, logits[0]


def summed_logits_of(segs: Sequence[Tensor], images: int, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """`summed_logits` of N = `images` images of one size: segs (2N, K, h_s, w_s), rows N.. from the flipped images, or
    (N, K, h_s, w_s). Yields (rows, (N, K, rows, W) float32)."""
    wide = [_interpolate_width(_unflipped(seg, images), size[1]) for seg in segs]
    taps = [_taps(each.shape[2], size[0], each.device) for each in wide]
    height = max(1, BAND_VALUES // (images * wide[0].shape[1] * size[1]))
    for start in range(0, size[0], height):
        rows = slice(start, min(start + height, size[0]))
        total = _interpolate_rows(wide[0], taps[0], rows)
        for each, own in zip(wide[1:], taps[1:], strict=True):
            total += _interpolate_rows(each, own, rows)
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


def _unflipped(seg: Tensor, images: int) -> Tensor:
    """(N, K, h, w): the sum of both rows of an image, the flipped one turned back."""
    return seg if len(seg) == images else seg[:images] + seg[images:].flip(-1)


def _interpolate_width(maps: Tensor, width: int) -> Tensor:
    """(N, K, h, w) -> (N, K, h, width) float32."""
    return F.interpolate(maps.float(), size=(maps.shape[2], width), mode="bilinear", align_corners=False)


def _taps(source: int, height: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of `height` rows: the two of `source` rows that it mixes, and the share of the second. Bilinear,
    align_corners=False."""
    position = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    position = (position * (source / height) - 0.5).clamp(0, source - 1)
    above = position.floor().long()
    return above, (above + 1).clamp(max=source - 1), (position - above)[:, None]


def _interpolate_rows(maps: Tensor, taps: tuple[Tensor, Tensor, Tensor], rows: slice) -> Tensor:
    """Rows `rows` of the (N, K, h, W) maps brought to the height of the taps."""
    above, below, share = (each[rows] for each in taps)
    return torch.lerp(maps[:, :, above], maps[:, :, below], share)


def allowed_classes(present: Tensor, num_classes: int) -> Tensor:
    """(K,) bool for `best_class`: the background and the present classes ((P,) integer in 0..C-1)."""
    allowed = torch.zeros(num_classes, dtype=torch.bool, device=present.device)
    allowed[0] = True
    allowed[present + 1] = True
    return allowed


def best_class(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """argmax over the K rows of (K, ...) logits, among the `allowed` ((K,) bool) ones only."""
    if allowed is None:
        return logits.max(0).indices  # on a CPU a third of argmax's time
    candidates = allowed.nonzero()[:, 0]
    return candidates[logits[candidates].max(0).indices]


def best_of(logits: Tensor, slots: Slots) -> Tensor:
    """As `best_class` for (N, K, ...) logits, among the background and each image's own classes: (N, ...) int64."""
    background = torch.zeros_like(slots.classes[:, :1])
    candidates = torch.cat([background, slots.classes + 1], 1)
    image = torch.arange(len(logits), device=logits.device)[:, None]
    values = logits[image, candidates]
    values[:, 1:].masked_fill_(~slots.filled.view(*slots.filled.shape, *[1] * (logits.dim() - 2)), float("-inf"))
    place = values.max(1).indices
    return candidates.gather(1, place.flatten(1)).view_as(place)
