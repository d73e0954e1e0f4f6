"""Figures, tables and galleries of runs in one HTML file that fetches nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from cosa_fast.errors import first_line
from cosa_fast.files import write_text
from cosa_fast.pictures.palette import shown_colours
from cosa_fast.report import curves, distributions
from cosa_fast.report.drawing import Drawing
from cosa_fast.report.reading import Record, Run, read_runs
from cosa_fast.run.folder import RunFolder

# (heading, figures of all runs together, figures of each run alone)
SECTIONS: tuple[tuple[str, Sequence[Callable[..., Drawing | None]], Sequence[Callable[..., Drawing | None]]], ...] = (
    (
        "What it reaches",
        (curves.segmentation_miou, curves.cam_miou, curves.without_masks, distributions.classes),
        (distributions.confusions,),
    ),
    (
        "Thresholds and perplexity",
        (curves.thresholds, curves.threshold_cost, distributions.sweeps),
        (distributions.confidences, distributions.perplexity_accuracy, distributions.perplexity_over_time),
    ),
    ("Training", (curves.losses, curves.pseudo_labels, curves.speed), ()),
)
HEADLINES = {
    "seg_label_free": "segmentation, label-free",
    "seg_label_aware": "segmentation, label-aware",
    "cam_best": "CAM M′, best threshold",
    "cam_at_threshold": "CAM M′ at ξ",
    "cam_aux_best": "CAM† M†′, best threshold",
    "ensemble_best": "ensemble, best threshold",
    "image_ap": "image AP",
    "seg_cam_agreement": "CAM/segmentation agreement",
}
WHY = {
    "gallery": ("Gallery", "evenly spread over the validation images"),
    "worst": ("Worst images", "by the segmentation of AN, the worst first"),
    "best": ("Best images", "by the segmentation of AN, the best first"),
}
_AGREE = "by the mIoU of AN's segmentation with the CAM's pseudo-label, which is no truth"
WHY_WITHOUT_MASKS = {
    "gallery": WHY["gallery"],
    "worst": ("Where they agree least", f"{_AGREE}, from the lowest up"),
    "best": ("Where they agree most", f"{_AGREE}, from the highest down"),
}
# What drawing from a file raises that was tampered with, or written by another version.
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# What two runs need not share to be the same experiment.
UNIMPORTANT = {("run", "name"), ("run", "output")}


def write(path: Path) -> Path:
    """Write a run's own report.html; returns where. UserError for a folder without a run, or one that cannot be
    written."""
    return write_page([path], RunFolder(path).report)


def write_page(paths: Sequence[Path], output: Path) -> Path:
    """Write the page of these runs to `output`, and return that. UserError as above."""
    write_text(output, page(read_runs(paths)))
    return output


def page(runs: Sequence[Run]) -> str:
    """The HTML of these runs."""
    environment = Environment(
        loader=PackageLoader("cosa_fast.report", "."),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    several = len(runs) > 1
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        several=several,
        runs=[_about(run) for run in runs],
        colours=curves.run_colours(runs) if several else {},
        headlines=_headlines(runs),
        settings=_differing_settings(runs) if several else [],
        sections=[(heading, _drawings(runs, together, alone)) for heading, together, alone in SECTIONS],
        galleries=[_gallery(run) for run in runs],
        pairs=[(run.name, run.has_masks, _pairs(run)) for run in runs],
        any_masks=any(run.has_masks for run in runs),
        biases=list(dict.fromkeys(filter(None, map(_bias, runs)))),
    )


def _about(run: Run) -> Record:
    total = run.setting("optim", "iterations")
    return {
        "name": run.name,
        "iteration": run.iteration,
        "total": total if isinstance(total, int) else None,
        "facts": {
            "data": f"{run.setting('data', 'root')} ({run.setting('data', 'format')})",
            "network": run.setting("model", "backbone"),
            "crop": run.setting("data", "crop_size"),
            "batch": run.setting("optim", "batch_size"),
            "seed": run.manifest.get("seed"),
            "machine": run.manifest.get("device"),
            "commit": str(run.manifest.get("commit"))[:12],
        },
    }


def _headlines(runs: Sequence[Run]) -> list[Record]:
    """Rows of the table of the last evaluations: of each run ON and AN."""
    rows = [(run, network, curves.last_figures(run, network)) for run in runs for network in ("on", "an")]
    used = [key for key in HEADLINES if any(key in figures for _, _, figures in rows)]
    return [
        {
            "run": run.name,
            "network": _title(run, network),
            "iteration": figures.get("iteration"),
            "images": _extent(figures["evaluated_on"]),
            "figures": {HEADLINES[key]: figures.get(key) for key in used},
        }
        for run, network, figures in rows
        if figures
    ]


def _extent(evaluated_on: Record) -> str:
    """ "8 of 222", "222"; a dash where it is not known."""
    images, of = evaluated_on.get("images", "–"), evaluated_on.get("of")
    return f"{images}" if of in (None, images) else f"{images} of {of}"


def _bias(run: Run) -> str | None:
    """What must be said of best.pt beside figures on the images that it is chosen on."""
    select = run.setting("eval", "select")
    if select in (None, "none") or not any("seg_label_free" in record for record in run.evaluations["an"]):
        return None
    return f"best.pt is chosen by eval.select = {select} on these images: its figures on the same images are too high."


def _title(run: Run, network: str) -> str:
    """ON, AN, or the architecture of a standalone network, which is logged in AN's place."""
    architecture = run.setting("model", "architecture", "CoSA")
    return network.upper() if architecture == "CoSA" else str(architecture)


def _differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """(section.key, the value of each run) where they are not all the same."""
    keys = list(dict.fromkeys((s, k) for run in runs for s, values in run.config.items() for k in values))
    rows = [(f"{s}.{k}", [run.setting(s, k, "–") for run in runs]) for s, k in keys if (s, k) not in UNIMPORTANT]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _drawings(
    runs: Sequence[Run],
    together: Sequence[Callable[..., Drawing | None]],
    alone: Sequence[Callable[..., Drawing | None]],
) -> list[Record]:
    found = [_draw(figure, runs, "") for figure in together]
    found += [_draw(figure, run, run.name if len(runs) > 1 else "") for figure in alone for run in runs]
    return [entry for entry in found if entry is not None]


def _draw(figure: Callable[..., Drawing | None], subject: Any, name: str) -> Record | None:
    """A figure that fails costs no other."""
    try:
        drawing = figure(subject)
    except DAMAGE as error:
        return {"title": figure.__name__, "run": name, "problem": first_line(error), "caption": "", "source": ""}
    if drawing is None:
        return None
    source = "data:image/svg+xml;base64," + base64.b64encode(drawing.svg.encode()).decode()
    return {"title": drawing.title, "run": name, "problem": "", "caption": drawing.caption, "source": source}


def _pairs(run: Run) -> list[distributions.Pair]:
    try:
        return distributions.confused_pairs(run)
    except DAMAGE:  # the figure of the matrix says so
        return []


def _gallery(run: Run) -> Record:
    found: Record = {"run": run.name, "iteration": 0, "legend": [], "groups": [], "has_masks": run.has_masks}
    try:
        pictures = run.pictures or {"rows": [], "classes": [], "iteration": 0}
        shown = sorted({index for row in pictures["rows"] for index in row["shown"]})
        rows = [{key: row[key] for key in ("why", "id", "present", "quality", "panels")} for row in pictures["rows"]]
        groups = [
            {"title": title, "note": note, "rows": [row for row in rows if row["why"] == why]}
            for why, (title, note) in (WHY if run.has_masks else WHY_WITHOUT_MASKS).items()
        ]
        legend = [(pictures["classes"][index - 1], _css(index)) for index in shown]
        found |= {"iteration": pictures["iteration"], "legend": legend}
        found["groups"] = [group for group in groups if group["rows"]]
    except DAMAGE as error:
        found["problem"] = first_line(error)
    return found


def _css(index: int) -> str:
    red, green, blue = shown_colours(np.array(index, np.int16)).tolist()
    return f"rgb({red},{green},{blue})"
