"""What can be known of networks without one mask: how well they find the classes of an image, and how far CAM and
segmentation agree. No figure here measures the segmentation against a truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cosa_fast.errors import counted
from cosa_fast.evaluation.evaluated import Evaluated
from cosa_fast.evaluation.gathering import Counted
from cosa_fast.evaluation.image_labels import ImageLabels
from cosa_fast.evaluation.legend import AGREEMENT, AVERAGE_PRECISION, NETWORKS, NO_MASKS, OF_PIXELS, legend
from cosa_fast.evaluation.metrics import ConfusionMatrix, mean_iou
from cosa_fast.evaluation.observed import Observed, Observer
from cosa_fast.evaluation.part import Seen
from cosa_fast.evaluation.protocol import Protocol
from cosa_fast.evaluation.result import shortened

# Before there is a ξ, the CAM's pseudo-label is cut at this one.
DEFAULT_THRESHOLD = 0.5
LONGEST_NAME = 60  # of a class in the table


@dataclass(frozen=True)
class LabelResult(Evaluated):
    """What was measured on `images` images without masks.

    classes: the C foreground names. image_ap: average precision of the classifier per class in percent, NaN for a class
    on none or all of the images. counts: images per class. agreement: IoU in percent, per class with background first,
    of the label-free segmentation with the CPL at `threshold`, which is told the image's label. foreground_seg,
    foreground_cam: shares of all pixels in [0, 1]. observed: what a report draws. Of a network without CAM there is no
    agreement, CPL or threshold.
    """

    classes: tuple[str, ...]
    image_ap: tuple[float, ...]
    counts: tuple[int, ...]
    agreement: tuple[float, ...]
    foreground_seg: float
    foreground_cam: float
    threshold: float
    has_cams: bool = True
    observed: Observed | None = field(default=None, repr=False, compare=False)

    def summary(self) -> dict[str, float]:
        """image_ap, the mean over classes in percent; seg_cam_agreement, mIoU in percent of the segmentation with the
        CPL; foreground_share_seg and foreground_share_cam in [0, 1]; cam_threshold. Nothing that needs a mask."""
        figures = {"image_ap": float(torch.tensor(self.image_ap, dtype=torch.float64).nanmean())}
        if self.has_cams:
            figures["seg_cam_agreement"] = float(mean_iou(torch.tensor(self.agreement, dtype=torch.float64)))
        figures["foreground_share_seg"] = self.foreground_seg
        if self.has_cams:
            figures |= {"foreground_share_cam": self.foreground_cam, "cam_threshold": self.threshold}
        return figures

    def per_class(self) -> dict[str, dict[str, float]]:
        """{class: {"images": how many show it, "image_ap": percent, "seg_cam_agreement": percent}}; of the background,
        which the agreement's mean is over too, that alone: the others are NaN."""
        if not self.has_cams:
            columns = zip(self.classes, self.counts, self.image_ap, strict=True)
            return {name: {"images": count, "image_ap": ap} for name, count, ap in columns}
        names, counts, aps = ("background", *self.classes), (math.nan, *self.counts), (math.nan, *self.image_ap)
        rows = zip(names, counts, aps, self.agreement, strict=True)
        return {name: dict(zip(("images", "image_ap", "seg_cam_agreement"), row, strict=True)) for name, *row in rows}

    def table(self) -> str:
        """Per-class table for a terminal, without a final newline; classes on no image, and without agreement, are left
        out and counted."""
        everything = self.per_class()
        counts = {name: (row["images"], row.get("seg_cam_agreement", math.nan)) for name, row in everything.items()}
        shown = {name: everything[name] for name, (images, iou) in counts.items() if images > 0 or iou >= 0}
        rows = [(shortened(name, LONGEST_NAME), row) for name, row in shown.items()]
        rows.append(("all classes", {**self.summary(), "images": self.images}))
        width = max(len(name) for name, _ in rows)
        lines = [f"{'no masks':<{width}}  images  image AP{'  CAM/seg IoU' * self.has_cams}"]
        for name, row in rows:
            line = f"{name:<{width}}  {_number(row['images'], 0):>6}  {_number(row['image_ap']):>8}"
            lines.append(line + (f"  {_number(row['seg_cam_agreement']):>11}" if self.has_cams else ""))
        cam = f", CAM at {self.threshold:.2f} {self.foreground_cam:.0%}" if self.has_cams else ""
        lines.append(f"foreground: segmentation {self.foreground_seg:.0%}{cam}")
        absent = len(everything) - len(shown)
        if absent:
            nowhere = "on none of these images" + " and in no segmentation" * self.has_cams
            lines.append(f"{counted(absent, 'class', 'es')} left out: {nowhere}")
        return "\n".join([*lines, *self.below_table()])

    def words(self) -> set[str]:
        """Those of the table, and of its titles, that `legend` explains."""
        return {NO_MASKS} | ({*NETWORKS, AVERAGE_PRECISION, AGREEMENT} if self.has_cams else {OF_PIXELS})

    def legend(self) -> str:
        """What the words of the table mean."""
        return legend(self.words())


class LabelCounts:
    """What is gathered over the set: a score per image and class, and one confusion matrix [CPL, segmentation].

    images: the indices in the set of those on all ranks together.
    """

    def __init__(
        self,
        classes: Sequence[str],
        protocol: Protocol,
        threshold: float | None,
        images: Sequence[int],
        device: torch.device,
    ) -> None:
        self._protocol = protocol
        self.threshold = DEFAULT_THRESHOLD if threshold is None else threshold
        self._classes = tuple(classes)
        self._images = len(images)
        self._labels = ImageLabels(len(images), len(classes), device)
        self._agreement = ConfusionMatrix(len(classes) + 1, device)
        self._observer = Observer(images, device)

    def add(self, seen: Seen, scales: Sequence[float], flip: bool) -> None:
        """Some images. scales, flip: of the segmentation."""
        protocol, part, counts = self._protocol, seen.part, []
        label = torch.zeros_like(part.truth)  # nothing but background, without a CAM
        if protocol.cam_scales:
            cams = {"cam": seen.cams(protocol)["cam"]}
            confidence, category = seen.strongest(cams, part.slots, protocol)["cam"]
            label = (category * (confidence >= self.threshold)).to(part.truth.dtype)
            self._observer.add_map("cam", confidence, category, part.truth)
        for rows, logits in protocol.logits(seen.segmentations(scales, flip), len(seen), seen.size):
            counts.append(self._agreement.add(logits.max(1).indices, label[:, rows]))
        self._observer.add_quality(part.positions, torch.stack(counts).sum(0))
        self._labels.add(part.positions, seen.logits(protocol), part.labels)

    def counted(self) -> list[Counted]:
        """All that is counted, after the last image."""
        return [*self._labels.counted(), self._agreement, *self._observer.counted()]

    def result(self) -> LabelResult:
        """After what is `counted` has been summed over the ranks."""
        counts = self._agreement.counts.double()
        pixels, has_cams = counts.sum().clamp(min=1), bool(self._protocol.cam_scales)
        return LabelResult(
            images=self._images,
            classes=self._classes,
            image_ap=self._labels.average_precision(),
            counts=tuple(self._labels.images_per_class()),
            agreement=tuple((100 * self._agreement.iou()).tolist()),
            foreground_seg=float(1 - counts[:, 0].sum() / pixels),
            foreground_cam=float(1 - counts[0].sum() / pixels),
            threshold=self.threshold,
            has_cams=has_cams,
            observed=self._observer.observed(self._agreement.counts) if has_cams else None,
        )


def _number(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
