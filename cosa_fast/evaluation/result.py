"""What an evaluation measured: scores by name, per class, and as a table for a terminal of 100 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from cosa_fast.errors import counted
from cosa_fast.evaluation.evaluated import COLUMNS, Evaluated
from cosa_fast.evaluation.legend import AVERAGE_PRECISION, NETWORKS, OF_PIXELS, legend
from cosa_fast.evaluation.observed import Observed


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
class EvalResult(Evaluated):
    """What `Evaluator.evaluate` measured on `images` images.

    classes: the K names, background first; indices: those of them that the means are over; coexistence: those that
    C-mIoU is over.
    cam_aux and ensemble are None for a network without auxiliary head, all CAM scores for one without CAM. The CAMs
    are told the image's true label; cam_label_free is M' gated by the classes that the classifier itself predicts.
    foreground_share_true: the share in [0, 1] of the pixels with a truth that are foreground; NaN if there are none.
    image_ap: average precision of the classifier over these images, in percent, of each of the K - 1 foreground
    classes; NaN for a class on none of them. observed: what a report draws.
    """

    classes: tuple[str, ...]
    indices: tuple[int, ...]
    label_free: Score
    label_aware: Score
    cam: CamScore | None
    cam_label_free: CamScore | None
    cam_aux: CamScore | None
    ensemble: CamScore | None
    foreground_share_true: float
    image_ap: tuple[float, ...] = ()
    coexistence: tuple[int, ...] = ()
    observed: Observed | None = field(default=None, repr=False, compare=False)

    @property
    def mean_image_ap(self) -> float:
        """Mean of `image_ap` over the foreground classes that the means are over and that occur; NaN without any."""
        values = [self.image_ap[k - 1] for k in self.indices if 0 < k <= len(self.image_ap)]
        values = [value for value in values if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan

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
        foreground_share_true. image_ap: mean average precision of the classifier in percent. What was not measured is
        left out.
        """
        columns = self.columns()
        values = {name: score.miou for name, score in columns.items()}
        for name, cam in self._cams().items():
            values[f"{name}_best_threshold"] = cam.best_threshold
            if cam.threshold is not None:
                values[f"{name}_threshold"] = cam.threshold
        values |= {f"c_miou_{name}": score.c_miou for name, score in columns.items() if score.c_miou is not None}
        values["foreground_share_true"] = self.foreground_share_true
        if not math.isnan(self.mean_image_ap):
            values["image_ap"] = self.mean_image_ap
        for name, own in (("cam", self.cam), ("cam_aux", self.cam_aux)):
            if own is not None and own.threshold_loss is not None and own.foreground_share is not None:
                values[f"{name}_threshold_loss"] = own.threshold_loss
                values[f"foreground_share_{name}"] = own.foreground_share
        return values

    def per_class(self) -> dict[str, dict[str, float]]:
        """IoU in percent, {class: {score name: value}}, of the classes averaged over; with image_ap but for the
        background."""
        columns = self.columns()
        rows = {self.classes[k]: {name: score.iou[k] for name, score in columns.items()} for k in self.indices}
        for k in self.indices:
            if 0 < k <= len(self.image_ap):
                rows[self.classes[k]]["image_ap"] = self.image_ap[k - 1]
        return rows

    def table(self) -> str:
        """Per-class table for a terminal, without a final newline; "-" where a class has no IoU. A class without any is
        left out, and counted; one that only C-mIoU is over stands below mIoU."""
        columns = self.columns()
        rows = self._rows(self.indices)
        absent = len(self.indices) - len(rows)
        rows.append(("mIoU", [score.miou for score in columns.values()]))
        if self.label_free.c_miou is not None:
            rows += self._rows([k for k in self.coexistence if k not in self.indices])
            rows.append(("C-mIoU", [math.nan if s.c_miou is None else s.c_miou for s in columns.values()]))
        lines = [format_table([_HEADINGS[name] for name in columns], rows, self._thresholds())]
        if not math.isnan(self.mean_image_ap):
            source = "" if self.cam is None else " of the classifier"
            lines.append(f"image AP{source}: {self.mean_image_ap:.2f}")
        if absent:
            lines.append(f"{counted(absent, 'class', 'es')} left out: neither in a mask nor in a prediction")
        return "\n".join([*lines, *self.below_table()])

    def _rows(self, indices: Sequence[int]) -> list[tuple[str, list[float]]]:
        """(name, IoU of every score) of those of the classes that have any."""
        scores = self.columns().values()
        rows = [(self.classes[k], [score.iou[k] for score in scores]) for k in indices]
        return [(name, values) for name, values in rows if not all(map(math.isnan, values))]

    def words(self) -> set[str]:
        """Those of the table, and of its titles, that `legend` explains."""
        words = {word for name in self.columns() for word in _HEADINGS[name]}
        words |= NETWORKS if self.cam is not None else set()
        if not math.isnan(self.mean_image_ap):
            words.add(OF_PIXELS if self.cam is None else AVERAGE_PRECISION)
        return words

    def legend(self) -> str:
        """What the words of the table mean."""
        return legend(self.words())

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


# The group of a column, and the column within it.
_HEADINGS = {
    "seg_label_free": ("segmentation", "free"),
    "seg_label_aware": ("segmentation", "aware"),
    "cam_best": ("CAM", "best"),
    "cam_at_threshold": ("CAM", "at ξ"),
    "cam_label_free_best": ("CAM free", "best"),
    "cam_label_free_at_threshold": ("CAM free", "at ξ"),
    "cam_aux_best": ("CAM†", "best"),
    "cam_aux_at_threshold": ("CAM†", "at ξ†"),
    "ensemble_best": ("ensemble", "best"),
    "ensemble_at_threshold": ("ensemble", "mean ξ"),
}
_NUMBER = 6  # columns of a figure, 100.00 at the longest


def shortened(name: str, width: int) -> str:
    """The name in at most `width` letters, its middle left out."""
    return name if len(name) <= width else f"{name[: width // 2]}…{name[len(name) - (width - 1) // 2 :]}"


def format_table(
    headings: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, list[float]]],
    thresholds: Sequence[float] = (),
    corner: str = "IoU in %",
) -> str:
    """Names to the left, one right-aligned column per score under the headings of its group and its own; the row called
    mIoU and what follows it stand below a line. thresholds: a last row, with one for each column. corner: what the
    figures are."""
    spans, titles, widths = [], [], []
    for title, group in groupby(headings, lambda heading: heading[0]):
        columns = [each for _, each in group]
        gaps = 2 * (len(columns) - 1)
        width = max(_NUMBER, *map(len, columns), -(-(len(title) - gaps) // len(columns)))
        titles.append(title)
        spans.append(width * len(columns) + gaps)
        widths += [width] * len(columns)
    names = [shortened(name, COLUMNS - sum(widths) - 2 * len(widths)) for name, _ in rows]
    first = max(map(len, [*names, "threshold", corner]))

    def line(name: str, cells: Sequence[str], widths: Sequence[int]) -> str:
        return "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])

    def number(value: float, digits: int) -> str:
        return "-" if math.isnan(value) else f"{value:.{digits}f}"

    lines = [line("", titles, spans), line(corner, [each for _, each in headings], widths)]
    rule = "-" * len(lines[1])
    lines.append(rule)
    for name, (full, values) in zip(names, rows, strict=True):
        if full == "mIoU":
            lines.append(rule)
        lines.append(line(name, [number(value, 2) for value in values], widths))
    if thresholds:
        lines.append(line("threshold", [number(value, 3) for value in thresholds], widths))
    return "\n".join(lines)
