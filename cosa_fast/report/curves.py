"""Figures of what changes with the iterations, a line a run."""

from __future__ import annotations

from collections.abc import Sequence

from cosa_fast.report.drawing import COLOURS, DASHES, MARKERS, Drawing, finish, line, panels, series, svg
from cosa_fast.report.reading import Record, Run, where

LOSSES = {
    "loss": "total",
    "cls": "cls",
    "cls_aux": "cls†",
    "c2s": "c2s",
    "c2s_aux": "c2s†",
    "s2c": "s2c",
    "csc": "csc",
    "energy": "energy",
}
PSEUDO_LABELS = {
    "foreground_share": "foreground of CPL, share of pixels",
    "foreground_reliability": "its share of the reliability",
    "perplexity": "mean perplexity",
    "omega": "|Ω|, tokens of a batch",
}


def losses(runs: Sequence[Run]) -> Drawing | None:
    """Every term that is logged, and their weighted sum."""
    caption = "Means between two log points. Co-training terms begin at optim.cotrain_after, and the total jumps there."
    return _multiples(runs, LOSSES, "Losses", caption)


def pseudo_labels(runs: Sequence[Run]) -> Drawing | None:
    """What the CPL and its reliability look like in training."""
    caption = (
        "Of the training batches, on the token grid. A share of the reliability near 0 pulls the segmentation towards "
        "background."
    )
    return _multiples(runs, PSEUDO_LABELS, "Pseudo-labels in training", caption)


def speed(runs: Sequence[Run]) -> Drawing | None:
    """Images per second and the time spent waiting for them."""
    names = {"images_per_second": "images per second", "data_wait": "share of time waiting for data"}
    return _multiples(runs, names, "Speed", "Of all processes together, evaluations left out.")


def thresholds(runs: Sequence[Run]) -> Drawing | None:
    """ξ and ξ† over time, and the fixed thresholds that would have fitted the truth best at each evaluation, where that
    can be known."""
    if not any("xi" in record for run in runs for record in run.training):
        return None
    known: list[Record] = []
    with panels(1, 1, 2.9) as (axes, figure):
        for number, run in enumerate(runs):
            for key, best, mark, dash in (
                ("xi", "cam_best_threshold", "ξ", DASHES[0]),
                ("xi_aux", "cam_aux_best_threshold", "ξ†", DASHES[1]),
            ):
                name, colour = _name(mark, run, runs), _colour(number, 0 if key == "xi" else 1, runs)
                points = series(run.training, key)
                line(axes[0], points, linestyle=dash, marker="x", color=colour, label=name)
                xs, ys = series(run.evaluations["an"], best)
                if points[0] and xs:
                    known += [record for record in run.evaluations["an"] if best in record]
                    label = f"best fixed for {name}" if len(runs) == 1 else None  # the legend is long as it is
                    axes[0].plot(xs, ys, MARKERS[0 if key == "xi" else 1], color=colour, label=label)
        axes[0].set(ylim=(0, 1), xlabel="iteration", ylabel="confidence")
        finish(axes)
        return Drawing(
            "Thresholds ξ and ξ†",
            "Lines: what the mixture of the training's confidences gives."
            + " Circles and squares: at each evaluation, the fixed threshold of AN's M′ (for ξ) and M†′ (for ξ†) with "
            f"the highest mIoU against the masks, on {where(known)}." * bool(known),
            svg(figure),
        )


def threshold_cost(runs: Sequence[Run]) -> Drawing | None:
    """The mIoU points between ξ, ξ† and the best fixed thresholds."""
    return _evaluated(
        runs,
        {"cam_threshold_loss": "ξ", "cam_aux_threshold_loss": "ξ†"},
        "Distance of ξ and ξ† to the best fixed threshold",
        "mIoU points that AN's CPL loses against the best fixed threshold; below 0, ξ beats the grid of fixed ones.",
        "mIoU points lost",
    )


def segmentation_miou(runs: Sequence[Run]) -> Drawing | None:
    """mIoU of both networks' segmentation."""
    return _evaluated(
        runs,
        {"seg_label_free": "label-free", "seg_label_aware": "label-aware"},
        "mIoU of the segmentation",
        "Label-free: the honest number; label-aware: told which classes an image holds.",
        "mIoU in %",
        networks=("on", "an"),
    )


def cam_miou(runs: Sequence[Run]) -> Drawing | None:
    """mIoU of AN's CPL."""
    return _evaluated(
        runs,
        {
            "cam_best": "M′, best threshold",
            "cam_at_threshold": "M′ at ξ",
            "cam_aux_best": "M†′, best threshold",
            "ensemble_best": "ensemble, best threshold",
        },
        "mIoU of the CAMs",
        "AN's pseudo-labels, told the images' classes.",
        "mIoU in %",
    )


def without_masks(runs: Sequence[Run]) -> Drawing | None:
    """What can be known without truth."""
    if not any("seg_cam_agreement" in record for run in runs for record in run.evaluations["an"]):
        return None
    return _evaluated(
        runs,
        {"seg_cam_agreement": "CAM/segmentation agreement (mIoU)", "image_ap": "image AP"},
        "Without masks",
        "Average precision of the classifier, and the mIoU of the segmentation with the CAM's pseudo-label: both may "
        "be wrong together.",
        "%",
        networks=("on", "an"),
    )


def _multiples(runs: Sequence[Run], names: dict[str, str], title: str, caption: str) -> Drawing | None:
    """A small panel for each figure that any run has logged."""
    found = {key: name for key, name in names.items() if any(key in record for run in runs for record in run.training)}
    if not found:
        return None
    rows = -(-len(found) // 2)
    with panels(rows, 2, 0.3 + 1.45 * rows) as (axes, figure):
        for place, (key, name) in zip(axes, found.items(), strict=False):
            for number, run in enumerate(runs):
                line(place, series(run.training, key), color=_colour(number, 0, runs), linestyle=_dash(number, runs))
            place.set_title(name)
            place.set_ylim(bottom=min(0.0, place.get_ylim()[0]))
            place.set_xlabel("iteration")
        finish(axes, legend=False)
        return Drawing(title, caption, svg(figure))


def _evaluated(
    runs: Sequence[Run],
    names: dict[str, str],
    title: str,
    caption: str,
    unit: str,
    networks: Sequence[str] = ("an",),
) -> Drawing | None:
    """One panel of figures over the evaluations. Of one run the colour tells the figure, of several the run; those
    show AN's first two figures only."""
    if len(runs) > 1:
        names, networks = dict(list(names.items())[:2]), ("an",)
    records = [record for run in runs for network in networks for record in run.evaluations[network]]
    records = [record for record in records if any(key in record for key in names)]
    if not records:
        return None
    with panels(1, 1, 2.9) as (axes, figure):
        for number, run in enumerate(runs):
            for which, (key, name) in enumerate(names.items()):
                for network in networks:
                    label = f"{network.upper()} {name}" if len(networks) > 1 else name
                    options = {
                        "color": _colour(number, which, runs),
                        "linestyle": DASHES[networks.index(network) if len(runs) == 1 else which % len(DASHES)],
                        "marker": MARKERS[which],
                        "fillstyle": "none" if network == "on" else "full",
                        "label": _name(label, run, runs),
                    }
                    line(axes[0], _finite(series(run.evaluations[network], key)), **options)
        axes[0].set(xlabel="iteration", ylabel=unit)
        axes[0].margins(y=0.15)
        finish(axes)
        return Drawing(title, f"{caption} On {where(records)}.", svg(figure))


def _finite(points: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    kept = [(x, y) for x, y in zip(*points, strict=True) if y == y]
    return [x for x, _ in kept], [y for _, y in kept]


def _colour(run: int, which: int, runs: Sequence[Run]) -> str:
    return COLOURS[(run if len(runs) > 1 else which) % len(COLOURS)]


def _dash(run: int, runs: Sequence[Run]) -> str:
    return DASHES[run // len(COLOURS) % len(DASHES)] if len(runs) > 1 else DASHES[0]


def _name(label: str, run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: {label}" if len(runs) > 1 else label


def run_colours(runs: Sequence[Run]) -> dict[str, str]:
    """The colour of each run's lines."""
    return {run.name: _colour(number, 0, runs) for number, run in enumerate(runs)}


def last_figures(run: Run, network: str) -> Record:
    """The newest evaluation of a network; empty before there is one."""
    return run.evaluations[network][-1] if run.evaluations[network] else {}
