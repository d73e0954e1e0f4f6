"""What an evaluation measured: scores by name, per class, and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """IoU in percent. iou: per class, NaN for one in neither truth nor prediction; c_miou: None if not asked for."""

    miou: float
    iou: tuple[float, ...]
    c_miou: float | None


@dataclass(frozen=True)
class CamScore:
    """CPLs of one map: at the fixed threshold that fits the truth best, and at ξ or ξ† (None: not given).

    foreground_share: of the pixels that have a truth, the share in [0, 1] that the CPL at ξ or ξ† calls foreground.
    """

    best: Score
    best_threshold: float
    at_threshold: Score | None
    threshold: float | None
    foreground_share: float | None

    @property
    def threshold_loss(self) -> float | None:
        """mIoU points that ξ or ξ† costs against the best fixed threshold, None without one. Below 0 where it lies
        between two fixed ones and beats both."""
        return None if self.at_threshold is None else self.best.miou - self.at_threshold.miou


@dataclass(frozen=True)
class EvalResult:
    """What `Evaluator.evaluate` measured on `images` images.

    classes: the K names, background first; indices: those of them that the means are over.
    cam_aux and ensemble are None for a network without auxiliary head. The CAMs are told the image's true label;
    cam_label_free is M' gated by the classes that the classifier itself predicts. foreground_share_true: the share in
    [0, 1] of the pixels with a truth that are foreground; NaN if there are none.
    """

    images: int
    classes: tuple[str, ...]
    indices: tuple[int, ...]
    label_free: Score
    label_aware: Score
    cam: CamScore
    cam_label_free: CamScore
    cam_aux: CamScore | None
    ensemble: CamScore | None
    foreground_share_true: float

    def columns(self) -> dict[str, Score]:
        """Every score by its name in `summary`."""
        columns = {"seg_label_free": self.label_free, "seg_label_aware": self.label_aware}
        for name, cam in self._cams().items():
            columns[f"{name}_best"] = cam.best
            if cam.at_threshold is not None:
                columns[f"{name}_at_threshold"] = cam.at_threshold
        return columns

    def summary(self) -> dict[str, float]:
        """mIoU in percent: seg_label_free, seg_label_aware, cam_best, cam_at_threshold, cam_label_free_...,
        cam_aux_..., ensemble_...

        With coexistence classes also c_miou_NAME for each of them. NAME_threshold and NAME_best_threshold are the
        confidences in [0, 1] behind NAME_at_threshold and NAME_best. How ξ and ξ† err: cam_threshold_loss and
        cam_aux_threshold_loss, the mIoU points that they cost against the best fixed threshold; foreground_share_cam
        and foreground_share_cam_aux, the shares of pixels that their CPLs call foreground, beside
        foreground_share_true. What was not measured is left out.
        """
        columns = self.columns()
        values = {name: score.miou for name, score in columns.items()}
        for name, cam in self._cams().items():
            values[f"{name}_best_threshold"] = cam.best_threshold
            if cam.threshold is not None:
                values[f"{name}_threshold"] = cam.threshold
        values |= {f"c_miou_{name}": score.c_miou for name, score in columns.items() if score.c_miou is not None}
        values["foreground_share_true"] = self.foreground_share_true
        for name, own in (("cam", self.cam), ("cam_aux", self.cam_aux)):
            if own is not None and own.threshold_loss is not None and own.foreground_share is not None:
                values[f"{name}_threshold_loss"] = own.threshold_loss
                values[f"foreground_share_{name}"] = own.foreground_share
        return values

    def per_class(self) -> dict[str, dict[str, float]]:
        """IoU in percent, {class: {score name: value}}, of the classes averaged over."""
        columns = self.columns()
        return {self.classes[k]: {name: score.iou[k] for name, score in columns.items()} for k in self.indices}

    def table(self) -> str:
        """Per-class table for a terminal, without a final newline; "-" where a class has no IoU."""
        columns = self.columns()
        rows = [(name, list(values.values())) for name, values in self.per_class().items()]
        rows.append(("mIoU", [score.miou for score in columns.values()]))
        if self.label_free.c_miou is not None:
            rows.append(("C-mIoU", [math.nan if s.c_miou is None else s.c_miou for s in columns.values()]))
        return _format_table([_HEADINGS[name] for name in columns], rows, self._thresholds())

    def _cams(self) -> dict[str, CamScore]:
        cams = {
            "cam": self.cam,
            "cam_label_free": self.cam_label_free,
            "cam_aux": self.cam_aux,
            "ensemble": self.ensemble,
        }
        return {name: cam for name, cam in cams.items() if cam is not None}

    def _thresholds(self) -> list[float]:
        """One per column; NaN for the segmentation."""
        values = [math.nan, math.nan]
        for cam in self._cams().values():
            values.append(cam.best_threshold)
            if cam.at_threshold is not None and cam.threshold is not None:
                values.append(cam.threshold)
        return values


_HEADINGS = {
    "seg_label_free": ("seg", "label-free"),
    "seg_label_aware": ("seg", "label-aware"),
    "cam_best": ("CAM", "best thr."),
    "cam_at_threshold": ("CAM", "at ξ"),
    "cam_label_free_best": ("CAM l.-free", "best thr."),
    "cam_label_free_at_threshold": ("CAM l.-free", "at ξ"),
    "cam_aux_best": ("CAM†", "best thr."),
    "cam_aux_at_threshold": ("CAM†", "at ξ†"),
    "ensemble_best": ("ensemble", "best thr."),
    "ensemble_at_threshold": ("ensemble", "at (ξ+ξ†)/2"),
}


def _format_table(
    headings: Sequence[tuple[str, str]], rows: Sequence[tuple[str, list[float]]], thresholds: Sequence[float]
) -> str:
    """Names to the left, one right-aligned column per score under its two-line heading."""
    first = max(len(name) for name, _ in [*rows, ("threshold", [])])
    widths = [max(len(top), len(bottom), 6) for top, bottom in headings]

    def line(name: str, cells: Sequence[str]) -> str:
        return "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])

    def number(value: float, digits: int) -> str:
        return "-" if math.isnan(value) else f"{value:.{digits}f}"

    lines = [line("", [top for top, _ in headings]), line("IoU in %", [bottom for _, bottom in headings])]
    rule = "-" * len(lines[0])
    lines.append(rule)
    for name, values in rows:
        if name == "mIoU":
            lines.append(rule)
        lines.append(line(name, [number(value, 2) for value in values]))
    lines.append(line("threshold", [number(value, 3) for value in thresholds]))
    return "\n".join(lines)
