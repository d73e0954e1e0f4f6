"""What can be known of networks without one mask: how well they find the classes of an image, and how far CAM and
segmentation agree. No figure here measures the segmentation against a truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cosa_fast.evaluation.metrics import ConfusionMatrix, average_precision, mean_iou
from cosa_fast.evaluation.observed import Observed
from cosa_fast.evaluation.result import extent, shortened

# Before there is a ξ, the CAM's pseudo-label is cut at this one.
DEFAULT_THRESHOLD = 0.5
LONGEST_NAME = 60  # of a class in the table


@dataclass(frozen=True)
class LabelResult:
    """What was measured on `images` images without masks.

    classes: the C foreground names. image_ap: average precision of the classifier per class in percent, NaN for a class
    on none or all of the images. counts: images per class. agreement: IoU in percent, per class with background first,
    of the label-free segmentation with the CPL at `threshold`, which is told the image's label. foreground_seg,
    foreground_cam: shares of all pixels in [0, 1]. set_size: images of the whole set, where only some were evaluated.
    observed: what a report draws. Of a network without CAM there is no agreement, CPL or threshold.
    """

    images: int
    classes: tuple[str, ...]
    image_ap: tuple[float, ...]
    counts: tuple[int, ...]
    agreement: tuple[float, ...]
    foreground_seg: float
    foreground_cam: float
    threshold: float
    has_cams: bool = True
    set_size: int | None = None
    observed: Observed | None = field(default=None, repr=False, compare=False)

    @property
    def extent(self) -> str:
        """How many images were evaluated, in words."""
        return extent(self.images, self.set_size)

    def summary(self) -> dict[str, float]:
        """image_ap, the mean over classes in percent; seg_cam_agreement, mIoU in percent of the segmentation with the
        CPL; foreground_share_seg and foreground_share_cam in [0, 1]; cam_threshold. Nothing that needs a mask."""
        figures = {
            "image_ap": float(torch.tensor(self.image_ap, dtype=torch.float64).nanmean()),
            "foreground_share_seg": self.foreground_seg,
        }
        if not self.has_cams:
            return figures
        return {
            **figures,
            "seg_cam_agreement": float(mean_iou(torch.tensor(self.agreement, dtype=torch.float64))),
            "foreground_share_cam": self.foreground_cam,
            "cam_threshold": self.threshold,
        }

    def per_class(self) -> dict[str, dict[str, float]]:
        """{class: {"images": how many show it, "image_ap": percent, "seg_cam_agreement": percent}}."""
        rows = zip(self.classes, self.counts, self.image_ap, self.agreement[1:], strict=True)
        found: dict[str, dict[str, float]] = {name: {"images": n, "image_ap": ap} for name, n, ap, _ in rows}
        if self.has_cams:
            for name, iou in zip(self.classes, self.agreement[1:], strict=True):
                found[name]["seg_cam_agreement"] = iou
        return found

    def table(self) -> str:
        """Per-class table for a terminal, without a final newline; classes on no image are left out and counted."""
        shown = {name: row for name, row in self.per_class().items() if row["images"]}
        rows = [(shortened(name, LONGEST_NAME), row) for name, row in shown.items()]
        rows.append(("all classes", {**self.summary(), "images": self.images}))
        width = max(len(name) for name, _ in rows)
        lines = [f"{'no masks':<{width}}  images  image AP{'  CAM/seg IoU' * self.has_cams}"]
        for name, row in rows:
            line = f"{name:<{width}}  {row['images']:>6}  {_percent(row['image_ap']):>8}"
            lines.append(line + (f"  {_percent(row['seg_cam_agreement']):>11}" if self.has_cams else ""))
        cam = f", CAM at {self.threshold:.2f} {self.foreground_cam:.0%}" if self.has_cams else ""
        lines.append(f"foreground: segmentation {self.foreground_seg:.0%}{cam}")
        absent = len(self.classes) - len(shown)
        return "\n".join(lines) + (f"\n{absent} classes left out: on none of these images" if absent else "")

    def legend(self) -> str:
        """What the words of the table mean."""
        if not self.has_cams:
            return (
                "image AP: of the probability that the segmentation gives a class at its surest pixel.\n"
                "Only masks can tell how good the segmentation is"
            )
        return (
            "ON: the online network, which learns; AN: the assignment network, its moving average\n"
            "image AP: average precision of the classifier; CAM/seg IoU: of the segmentation with what the CAM,\n"
            "told the image's classes, says. Both may be wrong together: only masks can tell how good they are"
        )


class LabelCounts:
    """What is gathered over the set: a score per image and class, and one confusion matrix [CPL, segmentation].

    images: how many there are on all ranks together. has_cams: whether the network has any; else the CPL is empty.
    """

    def __init__(
        self,
        classes: Sequence[str],
        images: int,
        threshold: float | None,
        device: torch.device,
        *,
        has_cams: bool = True,
    ) -> None:
        self._has_cams = has_cams
        self.threshold = DEFAULT_THRESHOLD if threshold is None else threshold
        self._classes = tuple(classes)
        self._scores = torch.zeros(images, len(classes), dtype=torch.float64, device=device)
        self._present = torch.zeros(images, len(classes), dtype=torch.float64, device=device)
        self.agreement = ConfusionMatrix(len(classes) + 1, device)

    def add_labels(self, position: int, logits: Sequence[Tensor], present: Tensor) -> None:
        """The image at `position` of those evaluated. logits: one (1 or 2, C) per scale; present: (P,) in 0..C-1."""
        self._scores[position] = torch.cat(list(logits)).double().mean(0)
        self._present[position, present] = 1

    def add_pixels(self, confidence: Tensor, category: Tensor, segmentation: Tensor) -> None:
        """confidence, category, segmentation: (H, W), category and segmentation in 0..C."""
        self.agreement.update(segmentation, category * (confidence >= self.threshold))

    def tensors(self) -> list[Tensor]:
        """All that is counted, to be summed over ranks."""
        return [self._scores, self._present, self.agreement.counts]

    def result(self) -> LabelResult:
        counts = self.agreement.counts.double()
        pixels = counts.sum().clamp(min=1)
        return LabelResult(
            images=len(self._scores),
            classes=self._classes,
            image_ap=tuple((100 * average_precision(self._scores, self._present > 0)).tolist()),
            counts=tuple(self._present.sum(0).long().tolist()),
            agreement=tuple((100 * self.agreement.iou()).tolist()),
            foreground_seg=float(1 - counts[:, 0].sum() / pixels),
            foreground_cam=float(1 - counts[0].sum() / pixels),
            threshold=self.threshold,
            has_cams=self._has_cams,
        )


def _percent(value: float) -> str:
    return "-" if value != value else f"{value:.1f}"
