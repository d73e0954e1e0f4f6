"""matplotlib's figures as SVG, in one look.

Colours are Okabe and Ito's, which eyes without red, green or blue cones keep apart; what they tell, a dash or a marker
tells too. Figures are as wide as a phone's screen, so that their letters stay legible there.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#F0E442")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# From light to dark, in grey too.
SHADES = "Blues"
WIDTH = 4.8  # inches
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "cosa_fast",  # the same data, the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.fontsize": 8,
    "legend.framealpha": 0.85,
    "legend.borderpad": 0.3,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Drawing:
    """One figure of the page. title: a heading. caption: what it shows. svg: the file's text."""

    title: str
    caption: str
    svg: str


@contextmanager
def panels(rows: int, columns: int, height: float, **options: Any) -> Iterator[tuple[list[Axes], Figure]]:
    """A figure of rows × columns axes, `height` inches high, and its axes one after another."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        yield list(figure.subplots(rows, columns, squeeze=False, **options).flat), figure


def svg(figure: Figure) -> str:
    """The figure's SVG, from its <svg> on: no document type and no metadata, which name addresses of the web."""
    with matplotlib.rc_context(STYLE):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def finish(axes: Sequence[Axes], *, legend: bool = True) -> None:
    """Hide axes that hold nothing, and put legends where there is something to tell apart."""
    for each in axes:
        if not each.has_data():
            each.set_visible(False)
            continue
        if each.get_xlabel() == "iteration":
            each.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if legend and len(each.get_legend_handles_labels()[1]) > 1:
            each.legend(loc="best")


def series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of the records that have the figure."""
    found = [(r["iteration"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [iteration for iteration, _ in found], [float(value) for _, value in found]


def line(axes: Axes, points: tuple[list[int], list[float]], **options: Any) -> None:
    """A curve; a marker too where there are few points, without which a single one would not be seen."""
    xs, ys = points
    if xs:
        axes.plot(xs, ys, marker=options.pop("marker", "o") if len(xs) <= 12 else None, **options)
