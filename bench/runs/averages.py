"""Means over seeds, and differences by seed, as tables in text and Markdown, as JSON, and as a chart.

A cell is mean ± standard deviation over the seeds (n − 1 in the denominator). Differences are taken seed by seed, so
that what both runs of a seed share (the order of the images, the first weights) cancels. A star marks a mean difference
whose 95 % interval by Student's t leaves out 0; one comparison in twenty gets its star by chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.tables import aligned, plotting

# Figures of an evaluation's summary() with their headings: mIoU and AP in percent; confidences, shares of pixels.
SCORES = {
    "seg_label_free": "seg l.-free",
    "seg_label_aware": "seg l.-aware",
    "cam_best": "CAM best",
    "cam_at_threshold": "CAM at ξ",
    "cam_aux_best": "CAM† best",
    "cam_aux_at_threshold": "CAM† at ξ†",
    "ensemble_best": "ens. best",
    "c_miou_seg_label_free": "C-mIoU l.-free",
    "c_miou_seg_label_aware": "C-mIoU l.-aware",
    "image_ap": "image AP",
    "seg_cam_agreement": "CAM/seg IoU",
}
THRESHOLDS = {
    "cam_threshold": "ξ",
    "cam_best_threshold": "best ξ",
    "cam_aux_threshold": "ξ†",
    "cam_aux_best_threshold": "best ξ†",
    "foreground_share_cam": "share at ξ",
    "foreground_share_cam_aux": "share† at ξ†",
    "foreground_share_true": "true share",
}
CHARTED = ("seg_label_free", "seg_label_aware", "cam_best", "cam_aux_best")
# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom; the last one serves for more, too.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# By row, seed and figure.
Results = Mapping[str, Mapping[int, Mapping[str, float]]]


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation (None of a single value) of n values."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    @property
    def differs(self) -> bool:
        """Whether the 95 % interval of the mean leaves out 0; never of a single value."""
        if self.std is None:
            return False
        return abs(self.mean) > T95[min(self.n - 2, len(T95) - 1)] * self.std / math.sqrt(self.n)

    def text(self, digits: int, seeds: int, signed: bool = False) -> str:
        """ "43.6 ± 0.5"; with its n behind it where that is not `seeds`."""
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        count = "" if self.n == seeds else f" ({self.n})"
        value = round(self.mean, digits) + 0.0  # not -0.0
        return f"{value:{'+' if signed else ''}.{digits}f}{'*' if signed and self.differs else ''}{spread}{count}"


Means = dict[str, dict[str, Mean]]


def means(results: Results) -> Means:
    """Of every row the mean of each figure over the seeds that have it."""
    return {row: _over_seeds(list(by_seed.values())) for row, by_seed in results.items()}


def differences(results: Results) -> Means:
    """Of every row but the first the means of its figures less the first row's of the same seed."""
    rows = list(results)
    if not rows:
        return {}
    first = results[rows[0]]
    return {
        row: _over_seeds(
            [
                {figure: value - first[seed][figure] for figure, value in own.items() if figure in first[seed]}
                for seed, own in results[row].items()
                if seed in first
            ]
        )
        for row in rows[1:]
    }


def _over_seeds(seeds: Sequence[Mapping[str, float]]) -> dict[str, Mean]:
    figures = dict.fromkeys(figure for own in seeds for figure in own)
    return {figure: Mean.of([own[figure] for own in seeds if figure in own]) for figure in figures}


def as_json(results: Results) -> dict[str, Any]:
    """{row: {"mean": {figure: {mean, std, n}}, "difference": the same, but of the first row}}."""
    found = {
        row: {"mean": {figure: asdict(mean) for figure, mean in own.items()}} for row, own in means(results).items()
    }
    for row, own in differences(results).items():
        found[row]["difference"] = {figure: asdict(mean) | {"differs": mean.differs} for figure, mean in own.items()}
    return found


@dataclass(frozen=True)
class Table:
    """A title, a heading and lines of cells; names, then counts, stand in the first two columns."""

    title: str
    head: list[str]
    lines: list[list[str]]

    def text(self) -> str:
        """For a terminal."""
        return f"{self.title}\n{aligned(self.head, self.lines)}"

    def markdown(self) -> str:
        """For a document."""
        rule = ["---", *["---:"] * (len(self.head) - 1)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in (self.head, rule, *self.lines))
        return f"**{self.title}**\n\n{body}"


def tables(an: Results, on: Results) -> list[Table]:
    """AN's scores, their differences to the first row and AN's thresholds; then ON's scores. Figures that no run has
    get no column."""
    first = next(iter(an), "")
    counts = {row: len(by_seed) for row, by_seed in an.items()}
    spread = "mean ± standard deviation over n seeds"
    return [
        _table(f"AN: mIoU and AP in %, {spread}", means(an), counts, SCORES, 1),
        _table(
            f"AN: points above {first}, seed by seed (*: 95 % interval without 0)",
            differences(an),
            counts,
            SCORES,
            1,
            True,
        ),
        _table(f"AN: thresholds and the foreground's share of the pixels, {spread}", means(an), counts, THRESHOLDS, 2),
        _table(f"ON: mIoU and AP in %, {spread}", means(on), counts, SCORES, 1),
    ]


def _table(
    title: str,
    rows: Means,
    counts: Mapping[str, int],
    figures: Mapping[str, str],
    digits: int,
    signed: bool = False,
) -> Table:
    shown = {figure: heading for figure, heading in figures.items() if any(figure in own for own in rows.values())}
    lines = []
    for row, own in rows.items():
        # A difference has as many pairs as both rows have seeds in common.
        seeds = max((mean.n for mean in own.values()), default=0) if signed else counts[row]
        cells = [own[figure].text(digits, seeds, signed) if figure in own else "-" for figure in shown]
        lines.append([row, str(seeds), *cells])
    return Table(title, ["", "n", *shown.values()], lines)


def save_chart(rows: Means, path: Path, title: str) -> None:
    """AN's means as points, with bars of a standard deviation; skipped, with a line that says so, where matplotlib is
    missing."""
    pyplot = plotting()
    if pyplot is None:
        return
    names = list(rows)
    figure, axis = pyplot.subplots(figsize=(8, 1.2 + 0.45 * len(names)))
    for number, name in enumerate(CHARTED):
        points = [(row, own[name]) for row, own in enumerate(rows.values()) if name in own]
        places = [row + 0.15 * (number - (len(CHARTED) - 1) / 2) for row, _ in points]
        spreads = [mean.std or 0.0 for _, mean in points]
        axis.errorbar([mean.mean for _, mean in points], places, xerr=spreads, fmt="o", ms=4, label=SCORES[name])
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(f"{title}: mIoU of AN in %")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, ncols=len(CHARTED), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"written {path}")
