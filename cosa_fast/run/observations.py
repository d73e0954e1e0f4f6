"""What an evaluation in the loop leaves for people to look at, besides its figures: RunFolder.observed and the gallery.

| in runs/NAME/observed | |
|---|---|
| NNN.json | the evaluation after NNN iterations: which images, per class, confusions, confidences, behind ξ and ξ† |
| pictures.json | the panels of the last evaluation's gallery, and of its worst and best images: JPEG in base64 |
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.engine.base import TrainingEngine
from cosa_fast.errors import first_line
from cosa_fast.evaluation.evaluator import AnyResult, Thresholds
from cosa_fast.evaluation.networks import NAMES_IN_FILES, Networks
from cosa_fast.files import write_json, written_aside
from cosa_fast.pictures.gallery import Row, rows, sheet, spread
from cosa_fast.run.evaluating import thresholds_of
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.log import RunLog

GALLERY_IMAGES = 8
# So many of the worst and of the best images, by AN's own segmentation of each.
EXTREMES = 4


def show_evaluation(
    folder: RunFolder,
    engine: TrainingEngine,
    dataset: ImageDataset,
    results: dict[str, AnyResult],
    log: RunLog,
    report: Callable[[Path], object] | None,
) -> None:
    """Write all of the above after an evaluation, gallery.png and TensorBoard's pictures, and call `report` with the
    run's path. What goes wrong costs a line, never the run."""
    try:
        write_observations(folder, engine, dataset, results, log)
        if report is not None:
            report(folder.path)
    except Exception as error:
        log.message(f"warning: pictures and report of iteration {engine.iteration}: {first_line(error, 300)}")


def write_observations(
    folder: RunFolder, engine: TrainingEngine, dataset: ImageDataset, results: dict[str, AnyResult], log: RunLog
) -> None:
    """As `show_evaluation`, without a report. UserError where it cannot be written."""
    classes, iteration = tuple(dataset.classes), engine.iteration
    thresholds = thresholds_of(engine)
    record = {
        "iteration": iteration,
        "classes": classes,
        "has_masks": dataset.has_masks,
        "evaluated_on": results["an"].evaluated_on(engine.config.data.val_split),
        "thresholds": _behind_thresholds(engine, thresholds),
        **{NAMES_IN_FILES[name]: _network(result) for name, result in results.items()},
    }
    write_json(folder.observation(iteration), record, indent=None)
    an = engine.masters["an"]
    networks = Networks(engine.config, classes, iteration, engine.masters.get("on", an), an, thresholds)
    quality = _quality(results["an"])
    chosen = {"gallery": spread(len(dataset), GALLERY_IMAGES), **_extremes(quality)}
    with engine.evaluating():
        shown = {why: rows(networks, dataset, indices) for why, indices in chosen.items()}
    entries = [
        _entry(why, row, quality.get(index))
        for why, found in shown.items()
        for index, row in zip(chosen[why], found, strict=True)
    ]
    write_json(folder.pictures, {"iteration": iteration, "classes": classes, "rows": entries}, indent=None)
    picture = sheet(shown["gallery"], classes)
    with written_aside(folder.gallery) as aside:
        picture.save(aside, format="PNG")
    log.picture(iteration, "gallery", picture)
    for name, result in results.items():
        for map_, counts in {} if result.observed is None else result.observed.confidence.items():
            log.histogram(iteration, f"confidence_{map_}/{NAMES_IN_FILES[name]}", counts.sum(1))


def _network(result: AnyResult) -> dict[str, Any]:
    observed = result.observed
    figures = {"images": result.images, "summary": result.summary(), "per_class": result.per_class()}
    return figures if observed is None else {**figures, **observed.record()}


def _behind_thresholds(engine: TrainingEngine, values: Thresholds) -> dict[str, Any]:
    """For M' and M†': ξ, the histogram of the confidences behind it, and the mixture (weight of the foreground, means
    and variances of background and foreground) where one was fitted. Nothing of a standalone network."""
    found = {}
    for name, value, threshold in zip(("cam", "cam_aux"), values, engine.thresholds, strict=False):
        state = threshold.state_dict()
        fit = state["fit"].tolist() if "fit" in state else [0.0, 0.0]
        found[name] = {
            "value": value,
            "floor": engine.config.threshold.floor,
            "histogram": state["queue"].sum(0).tolist() if "queue" in state else None,
            "mixture": fit[1:] if fit[1] > 0 else None,
        }
    return found


def _quality(result: AnyResult) -> dict[int, float]:
    """Per image index, where there is one."""
    if result.observed is None:
        return {}
    pairs = zip(result.observed.images, result.observed.quality, strict=True)
    return {index: value for index, value in pairs if value == value}


def _extremes(quality: dict[int, float]) -> dict[str, list[int]]:
    """Indices of the worst images, the worst first, and of the best ones."""
    ranked = sorted((value, index) for index, value in quality.items())
    count = min(EXTREMES, len(ranked) // 2)
    return {"worst": [index for _, index in ranked[:count]], "best": [index for _, index in ranked[::-1][:count]]}


def _entry(why: str, row: Row, quality: float | None) -> dict[str, Any]:
    """What pictures.json says of a row."""
    return {
        "why": why,
        "id": row.id,
        "present": row.present,
        "shown": sorted(row.shown),
        "quality": quality,
        "panels": {title: _jpeg(image) for title, image in row.panels.items()},
    }


def _jpeg(image: Image.Image) -> str:
    """In base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
