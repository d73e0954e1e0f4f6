"""Threshold estimators held against the truth: what each makes of the same confidences, and what it costs in mIoU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.evaluation_stream import BY_PIL, evaluation_stream
from cosa_fast.evaluation.cam import classes_in, normalised_cams, strongest
from cosa_fast.evaluation.evaluator import check_classes
from cosa_fast.evaluation.inference import forward_scales, inference, of_image
from cosa_fast.evaluation.metrics import ThresholdSweep, mean_iou, threshold_grid
from cosa_fast.evaluation.networks import Networks, load_networks
from cosa_fast.kernels.reference.mixture import fit, split

Array = NDArray[np.float64]

BINS = 256
MAPS = ("cam", "cam_aux")
STEP = 0.02  # of the thresholds whose mIoU is counted


@dataclass(frozen=True)
class Estimator:
    """`find(counts, floor)` gives a threshold in [0, 1], or None, for a histogram of the confidences (power 1) or of
    their square roots (power 2)."""

    find: Callable[[Array, float], float | None]
    floor: float
    power: int = 1
    grid: str = "token"

    def __call__(self, histograms: dict[str, list[float]]) -> float | None:
        found = self.find(np.array(histograms[f"{self.grid}_{self.power}"]), self.floor ** (1 / self.power))
        return None if found is None else found**self.power


def classification_likelihood(counts: Array, floor: float) -> float | None:
    """Eq. 6: the split with the largest classification likelihood under the mixture."""
    mixture = fit(counts, floor)
    return None if mixture is None else split(counts, floor, mixture)


def posterior(counts: Array, floor: float) -> float | None:
    """Where the mixture's foreground overtakes its background, between their means."""
    mixture = fit(counts, floor)
    if mixture is None:
        return None
    centres = _centres(counts)
    a, b, c = mixture.log_odds()
    between = (centres > mixture.mean_background) & (centres <= mixture.mean_foreground)
    found = between & (a + b * centres + c * centres**2 > 0)
    return float(centres[found.argmax()]) if found.any() else None


def shared_variance(counts: Array, floor: float) -> float | None:
    """The border of two Gaussians of one variance (EM)."""
    centres = _centres(counts)
    mass = np.where(centres > floor, counts, 0)
    mass = mass / mass.sum()
    means, weights = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    variance = 0.02
    for _ in range(2000):
        density = weights * np.exp(-((centres[:, None] - means) ** 2) / (2 * variance)) + 1e-300
        share = density / density.sum(1, keepdims=True) * mass[:, None]
        weights = share.sum(0)
        means = (share * centres[:, None]).sum(0) / weights
        variance = float((share * (centres[:, None] - means) ** 2).sum())
    middle = means.mean() - variance * np.log(weights[1] / weights[0]) / (means[1] - means[0])
    return float(middle) if 0 < middle < 1 else None


def otsu(counts: Array, floor: float) -> float | None:
    """The split with the largest variance between its sides."""
    centres = _centres(counts)
    mass = np.where(centres > floor, counts, 0)
    mass = mass / mass.sum()
    weight, moment = mass.cumsum(), (mass * centres).cumsum()
    between = (moment[-1] * weight - moment) ** 2 / np.maximum(weight * (1 - weight), 1e-12)
    return float(centres[between.argmax()])


ESTIMATORS = {
    "eq. 6": Estimator(classification_likelihood, 0.05),
    "eq. 6, floor 0": Estimator(classification_likelihood, 0.0),
    "eq. 6, floor 0.02": Estimator(classification_likelihood, 0.02),
    "eq. 6, floor 0.10": Estimator(classification_likelihood, 0.10),
    "eq. 6, pixel grid": Estimator(classification_likelihood, 0.05, grid="pixel"),
    "eq. 6, square roots": Estimator(classification_likelihood, 0.05, power=2),
    "eq. 6, square roots, floor 0.02": Estimator(classification_likelihood, 0.02, power=2),
    "posterior": Estimator(posterior, 0.05),
    "shared variance": Estimator(shared_variance, 0.05),
    "shared variance, square roots": Estimator(shared_variance, 0.05, power=2),
    "Otsu": Estimator(otsu, 0.0),
    "Otsu, floor 0.05": Estimator(otsu, 0.05),
}


def compare(checkpoint: Path, dataset: ImageDataset, count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """AN's maps of a checkpoint on `count` images of the set: histograms, mIoU by threshold, and what each estimator
    finds and loses, in points of mIoU; without an auxiliary head of M' alone. UserError for a set of other classes."""
    networks = load_networks(checkpoint)
    check_classes(dataset, networks.classes)
    chosen = [index * len(dataset) // count for index in range(count)]
    measured = _measure(networks, dataset, chosen)
    row: dict[str, Any] = {"checkpoint": str(checkpoint), "iteration": networks.iteration, "images": count}
    for name, (sweep, histograms) in measured.items():
        miou = 100 * mean_iou(sweep.iou(), _classes(networks)).numpy()
        thresholds = np.array(sweep.grid)
        found = {label: estimator(histograms) for label, estimator in ESTIMATORS.items()}
        row[name] = {
            "best_threshold": float(thresholds[miou.argmax()]),
            "best_miou": float(miou.max()),
            "miou": miou.tolist(),
            "histograms": histograms,
            "thresholds": found,
            "loss": {
                label: None if value is None else float(miou.max() - np.interp(value, thresholds, miou))
                for label, value in found.items()
            },
        }
        say(f"{checkpoint}: {name} best at {row[name]['best_threshold']:.2f}")
    return row


def mean_losses(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Points of mIoU that each estimator loses, averaged over the rows that have the map, by map; a fit that found
    nothing counts as NaN."""
    measured = {name: [row[name]["loss"] for row in rows if name in row] for name in MAPS}
    return {
        label: {name: float(np.mean([_number(loss[label]) for loss in own])) for name, own in measured.items() if own}
        for label in ESTIMATORS
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _centres(counts: Array) -> Array:
    return (np.arange(len(counts)) + 0.5) / len(counts)


def _classes(networks: Networks) -> list[int]:
    chosen = networks.config.eval.classes or networks.classes
    return [0, *(networks.classes.index(name) + 1 for name in chosen)]


def _measure(
    networks: Networks, dataset: ImageDataset, chosen: Sequence[int]
) -> dict[str, tuple[ThresholdSweep, dict[str, list[float]]]]:
    data, teacher = networks.config.data, networks.config.teacher
    maps = MAPS if networks.config.model.aux_layer is not None else MAPS[:1]
    grid = threshold_grid(STEP)
    sweeps = {name: ThresholdSweep(len(networks.classes) + 1, grid) for name in maps}
    counts = {
        name: {f"{place}_{power}": torch.zeros(BINS) for place in ("token", "pixel") for power in (1, 2)}
        for name in maps
    }
    stream = evaluation_stream(dataset, chosen, 1, data.mean, data.std, torch.device("cpu"), BY_PIL)
    with inference(networks.an):
        for _, images, (truth,), _ in stream:
            outputs = forward_scales(networks.an, images, teacher.scales, flip=teacher.flip, seg_scales=())
            own = [of_image(outputs, 0, 1)[scale] for scale in teacher.scales]
            present = classes_in(truth)
            for name in maps:
                cams: list[Tensor] = [getattr(output, name) for output in own]
                _, _, height, width = cams[0].shape
                for place, size in (("token", (height, width)), ("pixel", (truth.shape[0], truth.shape[1]))):
                    confidence, category = strongest(normalised_cams(cams, present[None], size)[0], present)
                    for power in (1, 2):
                        counts[name][f"{place}_{power}"] += torch.histc(confidence ** (1 / power), BINS, 0, 1)
                sweeps[name].update(confidence, category, truth)
    return {name: (sweeps[name], {key: value.tolist() for key, value in counts[name].items()}) for name in maps}
