"""What `predict` makes of an image, and its files.

| --what | files below the output folder |
|---|---|
| segmentation | masks/NAME.png, overlays/NAME.jpg: the segmentation (label-free; with --labels label-aware) |
| cpl | the same: the class of the strongest CAM M′ where it reaches ξ, else background |
| ensemble | the same, of (M′ + M†′)/2 at (ξ + ξ†)/2 |
| cam | overlays/NAME.jpg; cams/NAME.npz: cam, cam_aux (P, H, W) float16 in [0, 1], classes (P,) as in masks, P ≥ 0 |
| logits | logits/NAME.npz: logits (C + 1, H, W) float16, summed over scales and flips |

A mask is a palette PNG in VOC's colours whose pixels are class indices: 0 background, c for the c-th class (16-bit
grayscale for more than 254 classes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosa_fast.device import pick_device
from cosa_fast.errors import UserError
from cosa_fast.evaluation.cam import strongest
from cosa_fast.evaluation.cleaning import Cleaner
from cosa_fast.evaluation.inference import allowed_classes
from cosa_fast.evaluation.networks import Networks
from cosa_fast.evaluation.prediction import MAX_SIDE, named_classes, shrunk
from cosa_fast.evaluation.seeing import Seen, see
from cosa_fast.files import written_aside
from cosa_fast.pictures.overlay import class_map, overlay
from cosa_fast.pictures.palette import palette_image

Tag = TypeVar("Tag")
What = Literal["segmentation", "cpl", "cam", "ensemble", "logits"]
WHATS: tuple[What, ...] = get_args(What)
CAM_WHATS: tuple[What, ...] = ("cpl", "cam", "ensemble")
SUFFIXES = {"masks": ".png", "overlays": ".jpg", "cams": ".npz", "logits": ".npz"}
FOLDERS: dict[What, tuple[str, ...]] = {
    "segmentation": ("masks", "overlays"),
    "cpl": ("masks", "overlays"),
    "ensemble": ("masks", "overlays"),
    "cam": ("cams", "overlays"),
    "logits": ("logits",),
}


@dataclass(frozen=True)
class Prediction:
    """classes: (H, W) in 0..C, uint8, int16 for more than 254 classes: of the mask; of CAMs the strongest class
    where it reaches the threshold (without one: everywhere), of logits the segmentation. remark: more to say of it."""

    image: Image.Image
    seen: Seen
    classes: np.ndarray
    remark: str = ""


class Predictor:
    """Predictions of one network of a checkpoint. what, network ("on", "an"), scales and max_side: as the options of
    predict say. labels: names of the only classes that may appear; None: those of the image, where they are known, for
    CAMs and what is made of them, else all. threshold: where CAMs become foreground, in place of ξ, or of (ξ + ξ†)/2
    for the ensemble. crf: the method (evaluation/cleaning.py) that cleans segmentations up, crf_side: at most at this
    size.

    UserError for an unknown class name, for a checkpoint without ξ where one is needed and none is given, and for the
    CAMs of a standalone network.
    """

    def __init__(
        self,
        networks: Networks,
        what: What = "segmentation",
        *,
        network: str = "an",
        scales: Sequence[float] | None = None,
        labels: Sequence[str] | None = None,
        threshold: float | None = None,
        max_side: int = MAX_SIDE,
        crf: str | None = None,
        crf_side: int | None = None,
    ) -> None:
        if what in CAM_WHATS and networks.config.model.standalone:
            name = networks.config.model.architecture
            raise UserError(f"--what {what}: a {name} has no CAM; take --what segmentation or logits")
        self.what: What = what
        self.classes = networks.classes
        self.threshold, self.threshold_name = _threshold(networks, what, threshold)
        self._config = networks.config
        self._device = pick_device(networks.config.run.device)
        self._network = networks.named(network).to(self._device)
        self._scales = scales
        self._labels = None if labels is None else named_classes(labels, networks.classes)
        self._max_side = max_side
        self._crf, self._crf_side = crf, crf_side
        self._pixel_type = np.uint8 if len(networks.classes) <= 254 else np.int16

    def predict(self, image: Image.Image, present: Tensor | None = None) -> Prediction:
        """present: (P,) int64 in 0..C-1, what the image is known to hold. No CRF: `stream` does that, several images at
        a time."""
        seen = see(
            self._network,
            self._config,
            shrunk(image, self._max_side),
            present if self._labels is None else self._labels,
            size=(image.height, image.width),
            scales=self._scales,
            label_aware=self._labels is not None,
            with_cams=self.what in CAM_WHATS,
            with_logits=self.what == "logits" or self._crf is not None,
        )
        return Prediction(image, seen, self._classes_of(seen))

    def stream(self, images: Iterable[tuple[Tag, Image.Image, Tensor | None]]) -> Iterator[tuple[Tag, Prediction]]:
        """The prediction of each (tag, image, present), in their order, after the CRF where one was asked for."""
        predictions = ((tag, self.predict(image, present)) for tag, image, present in images)
        if self._crf is None:
            yield from predictions
            return
        with Cleaner([self._crf], self._config.data.workers, self._device, self._crf_side) as cleaner:
            problems = ((each, *self._problem(each[1])) for each in predictions)
            for (tag, prediction), cleaned in cleaner.map(problems):
                result = cleaned[self._crf]
                classes = result.labels.astype(self._pixel_type)
                yield tag, replace(prediction, classes=classes, remark=f" (CRF {result.seconds:.1f} s)")

    def _problem(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Class probabilities (K, H, W) and image (3, H, W) uint8, as the CRF takes them."""
        seen = prediction.seen
        logits = seen.require_logits() / seen.maps
        if self._labels is not None:
            allowed = allowed_classes(self._labels, len(logits))
            logits = logits.masked_fill(~allowed[:, None, None], float("-inf"))
        pixels = torch.from_numpy(np.array(prediction.image)).permute(2, 0, 1)
        return logits.softmax(0).to(self._device), pixels.to(self._device)

    def _classes_of(self, seen: Seen) -> np.ndarray:
        if self.what in ("segmentation", "logits"):
            return seen.segmentation.numpy()
        confidence, category = strongest(seen.ensemble(), seen.present) if self.what == "ensemble" else seen.strongest()
        kept = category if self.threshold is None else category * (confidence >= self.threshold)
        return kept.numpy().astype(self._pixel_type)

    def outputs(self, name: str, directory: Path) -> list[Path]:
        """The files that `write` writes for an image of that name."""
        return [directory / folder / f"{name}{SUFFIXES[folder]}" for folder in FOLDERS[self.what]]

    def write(self, prediction: Prediction, name: str, directory: Path) -> list[Path]:
        """Write the files; returns them. UserError where they cannot be written."""
        paths = self.outputs(name, directory)
        for folder, path in zip(FOLDERS[self.what], paths, strict=True):
            with written_aside(path, "choose another folder with -o") as aside:
                self._writer(folder)(prediction, aside)
        return paths

    def _writer(self, folder: str) -> Callable[[Prediction, Path], None]:
        return {"masks": _write_mask, "overlays": self._write_overlay, "cams": _write_cams, "logits": _write_logits}[
            folder
        ]

    def _write_overlay(self, prediction: Prediction, path: Path) -> None:
        if self.what == "cam":
            confidence, category = prediction.seen.strongest()
            picture = class_map(prediction.image, confidence.numpy(), category.numpy())
        else:
            picture = overlay(prediction.image, prediction.classes, self.classes)
        picture.save(path, format="JPEG", quality=90)

    @property
    def has_areas(self) -> bool:
        """Whether pixels are given to classes; without a threshold CAMs do not."""
        return self.what != "cam" or self.threshold is not None

    def record(self, prediction: Prediction) -> dict[str, Any]:
        """What scores.json says of an image: the classifier's probabilities, the classes of the CAMs, and the share of
        each class in `classes`, 0 left out; None without `has_areas`."""
        seen, names = prediction.seen, ("background", *self.classes)
        counts = np.bincount(prediction.classes.ravel(), minlength=len(names)) / prediction.classes.size
        return {
            "width": prediction.image.width,
            "height": prediction.image.height,
            "scores": dict(zip(self.classes, seen.scores.sigmoid().tolist(), strict=True)),
            "present": [self.classes[index] for index in seen.present.tolist()],
            "areas": {name: share for name, share in zip(names, counts.tolist(), strict=True) if share}
            if self.has_areas
            else None,
        }


def _threshold(networks: Networks, what: What, given: float | None) -> tuple[float | None, str]:
    """(threshold, what it is called); none where nothing is compared with one."""
    if what in ("segmentation", "logits"):
        return None, ""
    if given is not None:
        return given, "--threshold"
    xi, xi_aux = networks.thresholds
    if xi is None and what == "cam":
        return None, ""
    if xi is None:
        raise UserError(
            f"--what {what}: this checkpoint has no threshold ξ (it is from before co-training, or trained with a band "
            "or by another program); give one with --threshold, for example --threshold 0.4"
        )
    if what == "ensemble" and xi_aux is not None and networks.config.model.aux_layer is not None:
        return (xi + xi_aux) / 2, "the checkpoint's (ξ + ξ†)/2"
    return xi, "the checkpoint's ξ"


def _write_mask(prediction: Prediction, path: Path) -> None:
    palette_image(prediction.classes).save(path, format="PNG")


def _write_cams(prediction: Prediction, path: Path) -> None:
    seen = prediction.seen
    kind = np.uint8 if len(seen.scores) <= 254 else np.int16
    named: dict[str, Any] = dict(zip(("cam", "cam_aux"), (cam.half().numpy() for cam in seen.cams), strict=False))
    with path.open("wb") as file:
        np.savez_compressed(file, classes=(seen.present + 1).numpy().astype(kind), **named)


def _write_logits(prediction: Prediction, path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, logits=prediction.seen.require_logits().half().numpy())
