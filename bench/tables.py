"""What the benchmarks share when they report: quantiles, and bars of images per second."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20 %, median, 80 %."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def save_bars(panels: Sequence[tuple[str, Mapping[str, float]]], path: Path) -> None:
    """One panel of bars for each (title, {name: images per second}); skipped, with a line that says so, where
    matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no chart: pip install matplotlib")
        return
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.5 * len(panels)), squeeze=False)
    for axis, (title, bars) in zip(axes[:, 0], panels, strict=True):
        axis.barh(list(bars), list(bars.values()))
        axis.set_xlabel("images per second")
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"written {path}")
