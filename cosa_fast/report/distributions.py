"""Figures of one evaluation of AN: confidences and the mixture, thresholds, perplexity, classes, confusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray

from cosa_fast.evaluation.observed import OUTCOMES
from cosa_fast.evaluation.result import shortened
from cosa_fast.kernels import perplexity
from cosa_fast.report.drawing import COLOURS, DASHES, MARKERS, SHADES, WIDTH, Drawing, finish, panels, svg
from cosa_fast.report.reading import Record, Run, where

Array = NDArray[np.float64]
# (map in the files, its name, its threshold's)
MAPS = (("cam", "M′", "ξ"), ("cam_aux", "M†′", "ξ†"))
# Edges of perplexity: fine where most pixels are.
PERPLEXITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 10.0)
RANGES = ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 99.0))
# Beyond so many classes, letters in a matrix cannot be read.
MOST_CLASSES = 24
LONGEST_NAME = 24  # of a class beside a matrix
# What stands in for the truth where there are no masks.
AGREEMENT = " with the CAM's pseudo-label, which is no truth: both may be wrong"


class Pair(NamedTuple):
    """Pixels of class `truth` (without masks: of the CAM's pseudo-label) that the segmentation calls `found`; share: of
    all pixels of that truth, in [0, 1]."""

    truth: str
    found: str
    pixels: int
    share: float


def confidences(run: Run) -> Drawing | None:
    """The histograms behind ξ and ξ†, with the mixtures fitted to them."""
    known = _thresholds(run.last)
    found = [(name, mark, known[key]) for key, name, mark in MAPS if known.get(key, {}).get("histogram")]
    found = [(name, mark, entry) for name, mark, entry in found if sum(entry["histogram"])]
    if not found:
        return None
    with panels(len(found), 1, 0.5 + 1.75 * len(found), sharex=True) as (axes, figure):
        for place, (name, mark, entry) in zip(axes, found, strict=True):
            _histogram(place, entry, mark)
            place.set_title(f"confidences of {name}")
            place.set_ylabel("density")
        axes[-1].set(xlabel="confidence ν", xlim=(0, 1))
        finish(axes)
        return Drawing(
            "Confidences, the mixture and its threshold",
            "Of the last training batches (threshold.queue_length of them), on the token grid; confidences at or below "
            "threshold.floor take no part in the fit.",
            svg(figure),
        )


def _histogram(axes: Axes, entry: Record, mark: str) -> None:
    counts = np.asarray(entry["histogram"], dtype=np.float64)
    centres = (np.arange(len(counts)) + 0.5) / len(counts)
    counts[centres <= entry["floor"]] = 0
    width = max(1, len(counts) // 64)  # of a bar, in bins
    bars = np.add.reduceat(counts, np.arange(0, len(counts), width))
    edges = np.append(np.arange(0, len(counts), width), len(counts)) / len(counts)
    density = bars / max(counts.sum(), 1) / np.diff(edges)
    axes.stairs(density, edges, fill=True, color="#c8d4e0", label="confidences")
    highest = float(density.max())
    if entry["mixture"]:
        weight, mean0, mean1, variance0, variance1 = entry["mixture"]
        x = np.linspace(0, 1, 201)
        for part, mean, variance, colour, dash, name in (
            (1 - weight, mean0, variance0, COLOURS[0], DASHES[0], "background"),
            (weight, mean1, variance1, COLOURS[1], DASHES[1], "foreground"),
        ):
            y = part * np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
            axes.plot(x, y, dash, color=colour, label=name)
    if entry["value"] is not None:
        axes.axvline(entry["value"], color="black", linestyle="-.", label=f"{mark} = {entry['value']:.2f}")
    axes.set_ylim(0, 1.15 * highest if highest > 0 else 1)


def sweeps(runs: Sequence[Run]) -> Drawing | None:
    """mIoU of the CPL at every threshold."""
    shown = [run for run in runs if _an(run.last).get("sweep")]
    if not shown:
        return None
    with panels(1, 1, 2.9) as (axes, figure):
        for number, run in enumerate(runs):
            network, known = _an(run.last), _thresholds(run.last)
            for which, (key, name, mark) in enumerate(MAPS):
                values = network.get("sweep", {}).get(key)
                if not values:
                    continue
                colour = COLOURS[(number if len(runs) > 1 else which) % len(COLOURS)]
                label = f"{run.name}: {name}" if len(runs) > 1 else name
                axes[0].plot(network["thresholds"], values, DASHES[which], color=colour, label=label)
                value = known.get(key, {}).get("value")
                if value is not None:
                    height = float(np.interp(value, network["thresholds"], values))
                    axes[0].plot([value], [height], MARKERS[which], color=colour, label=f"{mark} = {value:.2f}")
        axes[0].set(xlim=(0, 1), xlabel="threshold", ylabel="mIoU of the CPL in %")
        finish(axes)
        return Drawing(
            "The CPL at every threshold",
            f"AN's pseudo-labels at fixed thresholds; markers: at ξ and ξ† of the training. On {_where(shown)}.",
            svg(figure),
        )


def perplexity_accuracy(run: Run) -> Drawing | None:
    """Whether perplexity tells right pixels from wrong ones."""
    found = [(name, *split) for key, name, _ in MAPS if (split := _by_perplexity(run, run.last, key)) is not None]
    found = [(name, right, known, every) for name, right, known, every in found if known.sum() > 0]
    if not found:
        return None
    with panels(2, 1, 3.4, sharex=True, height_ratios=(2, 1)) as (axes, figure):
        positions = np.arange(len(PERPLEXITIES) - 1)
        for which, (name, right, known, every) in enumerate(found):
            accuracy = np.where(known > 0, 100 * right / np.maximum(known, 1), np.nan)
            style: dict[str, Any] = {"color": COLOURS[which], "label": name}
            axes[0].plot(positions, accuracy, DASHES[which], marker=MARKERS[which], **style)
            width = 0.8 / len(found)
            axes[1].bar(positions + (which - (len(found) - 1) / 2) * width, 100 * every / every.sum(), width, **style)
        axes[0].set(ylim=(0, 100), ylabel="accuracy in %")
        axes[1].set(ylabel="pixels in %", xlabel="perplexity")
        axes[1].set_xticks(np.arange(len(PERPLEXITIES)) - 0.5, [f"{edge:g}" for edge in PERPLEXITIES], rotation=60)
        finish(axes)
        return Drawing(
            "Perplexity and accuracy",
            "Above: how many pixels of the CPL at ξ (ξ†) are right, by perplexity, in images with a class. Below: "
            "how many pixels have that perplexity. The method trusts pixels by 1/perplexity. "
            f"On {_where([run])}.",
            svg(figure),
        )


def perplexity_over_time(run: Run) -> Drawing | None:
    """Shares of the pixels by perplexity, a bar an evaluation."""
    bars = {
        name: [(o["iteration"], split[2]) for o in run.observations if (split := _by_perplexity(run, o, key))]
        for key, name, _ in MAPS
    }
    bars = {name: found for name, found in bars.items() if found}
    if not bars:
        return None
    with panels(len(bars), 1, 0.7 + 1.5 * len(bars), sharex=True) as (axes, figure):
        shades = [0.2, 0.45, 0.7, 1.0]
        for place, (name, found) in zip(axes, bars.items(), strict=True):
            left = np.zeros(len(found))
            labels = [f"{iteration}" for iteration, _ in found]
            for (low, high), shade in zip(RANGES, shades, strict=True):
                inside = [low <= edge < high for edge in PERPLEXITIES[:-1]]
                share = np.array([100 * every[inside].sum() / max(every.sum(), 1) for _, every in found])
                label = f"{low:g} to {high:g}" if high < 99 else f"above {low:g}"
                place.bar(labels, share, bottom=left, width=0.8, color=_shade(shade), edgecolor="white", label=label)
                left += share
            place.set(ylim=(0, 100), ylabel="pixels in %", title=f"perplexity of {name}")
            place.grid(False, axis="x")
            place.set_xticks(place.get_xticks()[:: max(1, len(found) // 8)])
        axes[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="perplexity")
        axes[-1].set_xlabel("evaluation after iteration")
        return Drawing(
            "Perplexity over time",
            "Images with a class, at the ξ and ξ† of each evaluation. Up to 1 (loss.csc_epsilon) a pixel is in Ω, and "
            f"csc compares it. On {where(run.evaluations['an'])}.",
            svg(figure),
        )


def classes(runs: Sequence[Run]) -> Drawing | None:
    """Per class: IoU of segmentation and CAM (without masks: with each other), and the classifier's average
    precision."""
    rows = [(run, _an(run.last).get("per_class", {})) for run in runs]
    names = list(dict.fromkeys(name for _, per_class in rows for name in per_class))
    if not names:
        return None
    true = any("seg_label_free" in values for _, per_class in rows for values in per_class.values())
    shown = {"seg_label_free": "segmentation", "cam_best": "CAM, best"} if true else {"seg_cam_agreement": "agreement"}
    with panels(1, 2, 0.9 + 0.21 * len(names) * max(1, len(runs) / 2), sharey=True) as (axes, figure):
        heights = {name: -position for position, name in enumerate(names)}
        for number, (run, per_class) in enumerate(rows):
            shift = 0.5 * (number - (len(runs) - 1) / 2) / max(len(runs), 1)
            for which, (key, label) in enumerate(shown.items()):
                found = [(v[key], heights[n] - shift) for n, v in per_class.items() if v.get(key) is not None]
                colour = COLOURS[(number if len(runs) > 1 else which) % len(COLOURS)]
                label = f"{run.name}: {label}" if len(runs) > 1 else label
                style: dict[str, Any] = {"color": colour, "fillstyle": "full" if which == 0 else "none", "label": label}
                if found:
                    axes[0].plot([x for x, _ in found], [y for _, y in found], MARKERS[which], **style)
            points = [
                (v["image_ap"], heights[n] - shift) for n, v in per_class.items() if v.get("image_ap") is not None
            ]
            colour = COLOURS[(number if len(runs) > 1 else 2) % len(COLOURS)]
            axes[1].plot([x for x, _ in points], [y for _, y in points], "^", color=colour)
        axes[0].set(xlim=(0, 100), xlabel="IoU in %" if true else "agreement, IoU in %", ylim=(-len(names) + 0.4, 0.6))
        axes[0].set_yticks(list(heights.values()), names)
        axes[1].set(xlim=(0, 100), xlabel="image AP in %")
        if len(axes[0].get_legend_handles_labels()[1]) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return Drawing(
            "Classes",
            f"AN at the last evaluation. Left: IoU{'' if true else AGREEMENT}. Right: average precision of the "
            f"classifier over the images. On {_where(runs)}.",
            svg(figure),
        )


def confusions(run: Run) -> Drawing | None:
    """The confusion matrix of the label-free segmentation with the truth, without masks with the CAM's pseudo-label;
    each row in percent of itself."""
    names, matrix = _confusion(run)
    if not names:
        return None
    kept = _most_confused(matrix)
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    longest = max(len(names[index]) for index in kept)
    size = 2.0 + 0.13 * len(kept) + 0.05 * min(longest, LONGEST_NAME)  # below the letters, room for the label beside
    with panels(1, 1, min(WIDTH, size)) as (axes, figure):
        axes[0].grid(False)
        drawn = axes[0].imshow(shares[np.ix_(kept, kept)], cmap=SHADES, vmin=0, vmax=100)
        labels = [shortened(names[index], LONGEST_NAME) for index in kept]
        axes[0].set_xticks(range(len(kept)), labels, rotation=90)
        axes[0].set_yticks(range(len(kept)), labels)
        axes[0].tick_params(labelsize=9 if len(kept) <= 12 else 7)
        axes[0].set(xlabel="segmentation", ylabel="truth" if run.has_masks else "CAM's\npseudo-label")
        figure.colorbar(drawn, ax=axes[0], label="% of the row", shrink=0.8)
        left = f" The {len(kept)} of {len(names)} classes with the most confusion." if len(kept) < len(names) else ""
        title = "Confusions" if run.has_masks else "Segmentation and CAM's pseudo-label"
        shown = f"AN at the last evaluation: label-free segmentation{'' if run.has_masks else AGREEMENT}."
        return Drawing(title, f"{shown}{left} On {_where([run])}.", svg(figure))


def confused_pairs(run: Run, count: int = 12) -> list[Pair]:
    """The largest confusions, by pixels; those with background included."""
    names, matrix = _confusion(run)
    pairs = [
        Pair(names[row], names[column], int(matrix[row, column]), float(matrix[row, column] / matrix[row].sum()))
        for row in range(len(names))
        for column in range(len(names))
        if row != column and matrix[row, column] > 0
    ]
    return sorted(pairs, key=lambda pair: -pair.pixels)[:count]


def _confusion(run: Run) -> tuple[list[str], Array]:
    """Classes that occur at all, background first, and their matrix [truth, segmentation]."""
    counts = np.asarray(_an(run.last).get("confusion", np.zeros((0, 0))), dtype=np.float64)
    names = ["background", *(run.last or {}).get("classes", [])]
    occurs = np.nonzero(counts.sum(0) + counts.sum(1))[0]
    return [names[index] for index in occurs], counts[np.ix_(occurs, occurs)]


def _most_confused(matrix: Array) -> list[int]:
    wrong = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
    return sorted(np.argsort(-wrong, kind="stable")[:MOST_CLASSES].tolist())


def _by_perplexity(run: Run, observation: Record | None, key: str) -> tuple[Array, Array, Array] | None:
    """Per range of PERPLEXITIES: pixels whose CPL is right, pixels with a truth, all pixels. None without ξ."""
    threshold = _thresholds(observation).get(key, {}).get("value")
    counts = _an(observation).get("confidence", {}).get(key)
    if threshold is None or counts is None:
        return None
    table = np.asarray(counts, dtype=np.float64)
    centres = (np.arange(len(table)) + 0.5) / len(table)
    alpha, beta = run.setting("loss", "alpha", 0.8), run.setting("loss", "beta", 1.0)
    values = perplexity(torch.from_numpy(centres), threshold, alpha, beta, backend="reference").numpy()
    place = np.clip(np.digitize(values, PERPLEXITIES) - 1, 0, len(PERPLEXITIES) - 2)
    right = np.where(centres >= threshold, table[:, OUTCOMES.index("right")], table[:, OUTCOMES.index("background")])
    known = table.sum(1) - table[:, OUTCOMES.index("unknown")]

    def grouped(values: Array) -> Array:
        return np.bincount(place, values, len(PERPLEXITIES) - 1).astype(np.float64)

    return grouped(right), grouped(known), grouped(table.sum(1))


def _shade(position: float) -> tuple[float, ...]:
    return tuple(matplotlib.colormaps[SHADES](position))


def _an(observation: Record | None) -> Record:
    return (observation or {}).get("teacher", {})


def _thresholds(observation: Record | None) -> dict[str, Record]:
    return (observation or {}).get("thresholds", {})


def _where(runs: Sequence[Run]) -> str:
    """Which images the last evaluations are of."""
    return where([record for run in runs for record in run.evaluations["an"][-1:]])
