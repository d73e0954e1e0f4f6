"""What networks see in images: panels for the report and TensorBoard, and one sheet of them as a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from cosa_fast.data_pipeline.batch import ignored
from cosa_fast.evaluation.cam import classes_in
from cosa_fast.evaluation.networks import Networks
from cosa_fast.evaluation.networks import title as network_title
from cosa_fast.evaluation.seeing import see
from cosa_fast.files import written_aside
from cosa_fast.kernels import perplexity
from cosa_fast.pictures.overlay import class_map, font, heat_map, overlay, selection
from cosa_fast.pictures.palette import shown_colours

if TYPE_CHECKING:
    from cosa_fast.config.schema import Config
    from cosa_fast.data_pipeline.datasets.base import ImageDataset

TILE = 224
MARGIN = 6
LINE = 18
# Before there is a ξ, the CPL is cut at this one.
DEFAULT_THRESHOLD = 0.5
# The end of the colour scale of a perplexity, whose range begins at 0.22 (METHOD section 4).
PERPLEXITY_SHOWN = 3.0


@dataclass(frozen=True)
class Row:
    """One image. present: the names of its classes, by its mask or its label. panels: pictures by title, at most TILE
    wide and high, of one size. shown: the classes, 1.., that occur in a panel."""

    id: str
    present: tuple[str, ...]
    panels: dict[str, Image.Image]
    shown: frozenset[int]


def rows(networks: Networks, dataset: ImageDataset, indices: Sequence[int]) -> list[Row]:
    """Panels of the images at `indices`: image, CAM M' and CAM† M†' of AN, CPL at ξ, perplexity, Ω, segmentation of AN
    (label-free), and the truth where there is one; of a standalone network image, segmentation and truth.

    Ω are the pixels with P† ≤ csc_epsilon, here at full resolution. The CAMs are gated by the image's true label: the
    classes of its mask; the data set's label where that has no masks. A run with a band has neither perplexity nor Ω.
    """
    return [_row(networks, dataset, index) for index in indices]


def gallery(networks: Networks, dataset: ImageDataset, path: Path, count: int = 8) -> None:
    """Write a PNG sheet with one row per image, `count` of them evenly spread over the set. UserError if the file
    cannot be written."""
    write_sheet(rows(networks, dataset, spread(len(dataset), count)), networks.classes, path)


def spread(length: int, count: int) -> list[int]:
    """`count` indices (fewer in a shorter set), evenly spread over 0..length - 1."""
    count = min(count, length)
    return [position * length // count for position in range(count)]


def write_sheet(rows: Sequence[Row], classes: Sequence[str], path: Path) -> None:
    """The rows as a PNG. UserError if the file cannot be written."""
    with written_aside(path) as aside:
        sheet(rows, classes).save(aside, format="PNG")


def sheet(rows: Sequence[Row], classes: Sequence[str]) -> Image.Image:
    """Panels in a grid under their titles, each row under the image's name and classes, and the colours' legend."""
    titles = list(dict.fromkeys(title for row in rows for title in row.panels))
    shown = sorted(set().union(*(row.shown for row in rows)))
    step, height = TILE + MARGIN, TILE + LINE + MARGIN
    width = MARGIN + max(len(titles), 1) * step
    legend = _legend([(index, classes[index - 1]) for index in shown], width)
    canvas = Image.new("RGB", (width, LINE + MARGIN + len(rows) * height + legend.height), "white")
    draw, letters = ImageDraw.Draw(canvas), font(13)
    for column, title in enumerate(titles):
        draw.text((MARGIN + column * step, 3), title, fill="black", font=letters)
    for number, row in enumerate(rows):
        top = LINE + MARGIN + number * height
        draw.text((MARGIN, top), f"{row.id}: {', '.join(row.present) or 'no class'}", fill="black", font=letters)
        for column, title in enumerate(titles):
            if title in row.panels:
                canvas.paste(_centred(row.panels[title]), (MARGIN + column * step, top + LINE))
    canvas.paste(legend, (0, canvas.height - legend.height))
    return canvas


def _legend(entries: Sequence[tuple[int, str]], width: int) -> Image.Image:
    """Squares of the classes' colours with the names, in as many lines as they need."""
    letters = font(13)
    places, x, y = [], MARGIN, MARGIN
    for index, name in entries:
        length = 20 + round(letters.getlength(name)) + 16
        if x + length > width and x > MARGIN:
            x, y = MARGIN, y + LINE
        places.append((index, name, x, y))
        x += length
    image = Image.new("RGB", (width, y + LINE + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    for index, name, x, y in places:
        draw.rectangle(
            (x, y + 2, x + 13, y + 15), fill=tuple(shown_colours(np.array(index, np.int16)).tolist()), outline="black"
        )
        draw.text((x + 20, y), name, fill="black", font=letters)
    return image


def _row(networks: Networks, dataset: ImageDataset, index: int) -> Row:
    image = dataset.image(index)
    mask = torch.from_numpy(dataset.mask(index)) if dataset.has_masks else None
    present = torch.from_numpy(dataset.labels(index)).nonzero()[:, 0] if mask is None else classes_in(mask)
    seen = see(networks.an, networks.config, image, present)
    small = _fit(image)
    classes = {
        f"segmentation ({network_title('an', networks.config)})": seen.segmentation,
        **({} if mask is None else {"truth": mask}),
    }
    strongest = [seen.strongest(which) for which in range(len(seen.cams))]
    maps = [(_shrunk(confidence, small), _shrunk(category, small)) for confidence, category in strongest]
    panels, shown = _cam_panels(networks, small, maps) if maps else ({"image": small}, set[int]())
    for title, indices in classes.items():
        panels[title] = overlay(small, _shrunk(indices, small))
        shown |= set(indices[~ignored(indices)].unique().tolist())
    names = tuple(networks.classes[each] for each in present.tolist())
    shown |= {each + 1 for each in present.tolist()}
    return Row(dataset.ids[index], names, panels, frozenset(shown - {0}))


def _cam_panels(
    networks: Networks, image: Image.Image, maps: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[dict[str, Image.Image], set[int]]:
    """Image, CAMs, CPL, perplexity and Ω, and the classes in the CPL. maps: (ν, ŷ) of M' and M†', as large as image."""
    config = networks.config
    xi, xi_aux = (DEFAULT_THRESHOLD if value is None else value for value in networks.thresholds)
    confidence, category = maps[0]
    pseudo_label = np.where(confidence >= xi, category, 0).astype(np.int16)
    panels = {"image": image, "CAM (AN)": class_map(image, confidence, category)}
    if len(maps) > 1:
        panels["CAM† (AN)"] = class_map(image, *maps[1])
    known = "ξ =" if networks.thresholds[0] is not None else "at"
    panels[f"CPL ({known} {xi:.2f})"] = overlay(image, pseudo_label)
    if config.threshold.mode != "band":
        panels["perplexity (dark: sure)"] = heat_map(_perplexity(config, confidence, xi) / PERPLEXITY_SHOWN)
        by = (maps[1][0], xi_aux) if len(maps) > 1 else (confidence, xi)
        panels["Ω (not dark)"] = selection(image, _perplexity(config, *by) <= config.loss.csc_epsilon)
    return panels, set(np.unique(pseudo_label).tolist())


def _perplexity(config: Config, confidence: np.ndarray, threshold: float) -> np.ndarray:
    values = perplexity(
        torch.from_numpy(confidence), threshold, config.loss.alpha, config.loss.beta, backend="reference"
    )
    return values.numpy()


def _fit(image: Image.Image) -> Image.Image:
    """The image, shrunk or enlarged without distortion to TILE on its longer side."""
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR)


def _shrunk(map_: Tensor, image: Image.Image) -> np.ndarray:
    """(H, W) confidences (bilinear) or class indices (nearest, in their own type) at the size of `image`."""
    size = (image.height, image.width)
    if map_.is_floating_point():
        return F.interpolate(map_[None, None], size=size, mode="bilinear", antialias=True)[0, 0].numpy()
    return F.interpolate(map_[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(map_.dtype).numpy()


def _centred(image: Image.Image) -> Image.Image:
    """The image in the middle of a TILE×TILE square of grey."""
    tile = Image.new("RGB", (TILE, TILE), "lightgrey")
    tile.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return tile
