"""The gallery of a run: one sheet of its images, CAMs, pseudo-labels and segmentations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cosa_fast.data_pipeline.views.pixels import normalise
from cosa_fast.evaluation.cam import classes_in, normalised_cams, strongest
from cosa_fast.evaluation.inference import forward_scales, inference, segment
from cosa_fast.files import written_aside
from cosa_fast.pictures.overlay import heat_map, overlay

if TYPE_CHECKING:
    from cosa_fast.data_pipeline.datasets.base import ImageDataset
    from cosa_fast.evaluation.networks import Networks

TILE = 192
MARGIN = 6
HEADING = 20
# Before there is a ξ, the CPL column shows this one.
DEFAULT_THRESHOLD = 0.5


def gallery(networks: Networks, dataset: ImageDataset, path: Path, count: int = 8) -> None:
    """Write a PNG sheet with one row per image, `count` of them evenly spread over the set.

    Columns: image, CAM (M' of AN), CPL (AN, at ξ), segmentation (ON, label-free), and the truth where there is one.
    The CAMs are gated by the image's true label: the classes of its mask; the data set's label where that has no masks.
    UserError if the file cannot be written.
    """
    threshold = DEFAULT_THRESHOLD if networks.thresholds[0] is None else networks.thresholds[0]
    headings = ["image", "CAM", f"CPL (threshold {threshold:.2f})", "segmentation", *["truth"] * dataset.has_masks]
    count = min(count, len(dataset))
    rows = [_row(networks, dataset, position * len(dataset) // count, threshold) for position in range(count)]
    with written_aside(path) as aside:
        sheet(headings, rows).save(aside, format="PNG")


def sheet(headings: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Images in a grid under column headings, each shrunk or enlarged into its tile without distortion."""
    step = TILE + MARGIN
    canvas = Image.new("RGB", (MARGIN + len(headings) * step, HEADING + MARGIN + len(rows) * step), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for column, heading in enumerate(headings):
        draw.text((MARGIN + column * step, MARGIN), heading, fill="black", font=font)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            canvas.paste(_fit(image), (MARGIN + column * step, HEADING + MARGIN + row * step))
    return canvas


def _row(networks: Networks, dataset: ImageDataset, index: int, threshold: float) -> list[Image.Image]:
    image = dataset.image(index)
    mask = dataset.mask(index) if dataset.has_masks else None
    label = dataset.labels(index).nonzero()[0] if mask is None else classes_in(torch.from_numpy(mask)).numpy()
    data, evaluation = networks.config.data, networks.config.eval
    device = next(networks.on.parameters()).device
    pixels = normalise(image, data.mean, data.std).to(device)
    confidence, category = _assign(networks, pixels, torch.as_tensor(label, device=device))
    size = (image.height, image.width)
    segmentation = segment(networks.on, pixels, size, evaluation.scales, flip=evaluation.flip).numpy()
    pseudo_label = np.where(confidence >= threshold, category, 0).astype(segmentation.dtype)
    pictures = [image, heat_map(confidence, image), overlay(image, pseudo_label), overlay(image, segmentation)]
    return pictures if mask is None else [*pictures, overlay(image, mask)]


def _assign(networks: Networks, pixels: Tensor, present: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """ν and ŷ of AN for one image (3, H, W) on the device, as (H, W) arrays."""
    teacher = networks.config.teacher
    with inference(networks.an):
        outputs = forward_scales(networks.an, pixels[None], teacher.scales, flip=teacher.flip, seg_scales=())
        maps = normalised_cams([output.cam for output in outputs.values()], present, (pixels.shape[1], pixels.shape[2]))
        confidence, category = strongest(maps, present)
    return confidence.cpu().numpy(), category.cpu().numpy()


def _fit(image: Image.Image) -> Image.Image:
    """The image inside a TILE×TILE square, centred on grey."""
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    tile = Image.new("RGB", (TILE, TILE), "lightgrey")
    tile.paste(image.resize(size, Image.Resampling.BILINEAR), ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile
