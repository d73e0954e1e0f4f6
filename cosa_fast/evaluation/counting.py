"""Everything that is counted over a set with masks, where it is computed: segmentation, CAMs, image labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosa_fast.evaluation.cam import slots_of
from cosa_fast.evaluation.gathering import Counted
from cosa_fast.evaluation.image_labels import ImageLabels, predicted_labels
from cosa_fast.evaluation.inference import best_of
from cosa_fast.evaluation.metrics import ConfusionMatrix, ThresholdSweep, mean_iou, threshold_grid
from cosa_fast.evaluation.observed import Observed, Observer
from cosa_fast.evaluation.part import Seen
from cosa_fast.evaluation.protocol import Protocol, Thresholds
from cosa_fast.evaluation.result import CamScore, EvalResult, Score


class Counts:
    """What is counted of one network.

    classes: the K names, background first. step: of the grid of thresholds. thresholds: the run's own. images: the
    indices in the set of those on all ranks together.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        step: float,
        protocol: Protocol,
        thresholds: Thresholds,
        images: Sequence[int],
        device: torch.device,
    ) -> None:
        num_classes = len(classes)
        self.classes = classes
        self._images = len(images)
        self._protocol = protocol
        self._label_free = ConfusionMatrix(num_classes, device)
        self._label_aware = ConfusionMatrix(num_classes, device)
        main, aux = (None if value is None else float(value) for value in protocol.thresholds(thresholds))
        mean = None if main is None or aux is None else (main + aux) / 2
        own = {"cam": main, "cam_label_free": main, "cam_aux": aux, "ensemble": mean}
        grid = threshold_grid(step)
        self._thresholds = own
        self._sweeps = {name: ThresholdSweep(num_classes, grid, device, value) for name, value in own.items()}
        self._labels = ImageLabels(len(images), num_classes - 1, device)
        self._observer = Observer(images, device)

    def add(self, seen: Seen, scales: Sequence[float], flip: bool) -> None:
        """Some images. scales, flip: of the segmentation."""
        counts, part = [], seen.part
        for rows, logits in self._protocol.logits(seen.segmentations(scales, flip), len(seen), seen.size):
            counts.append(self._label_free.add(logits.max(1).indices, part.truth[:, rows]))
            self._label_aware.add(best_of(logits, part.slots), part.truth[:, rows])
        self._observer.add_quality(part.positions, torch.stack(counts).sum(0))
        if self._protocol.cam_scales:
            self._add_cams(seen)
        self._labels.add(part.positions, seen.logits(self._protocol), part.labels)

    def _add_cams(self, seen: Seen) -> None:
        protocol, cams, truth = self._protocol, seen.cams(self._protocol), seen.part.truth
        told = seen.strongest(cams, seen.part.slots, protocol)
        predicted = slots_of(predicted_labels(seen.logits(protocol), len(seen)))
        told["cam_label_free"] = seen.strongest({"cam": cams["cam"]}, predicted, protocol)["cam"]
        for name, (confidence, category) in told.items():
            self._sweeps[name].add(confidence, category, truth)
            if name in ("cam", "cam_aux"):
                self._observer.add_map(name, confidence, category, truth)

    def counted(self) -> list[Counted]:
        """All that is counted, after the last image."""
        own: list[Counted] = [self._label_free, self._label_aware, *self._sweeps.values()]
        return [*own, *self._labels.counted(), *self._observer.counted()]

    def result(self, indices: tuple[int, ...], coexistence: Sequence[int]) -> EvalResult:
        """After what is `counted` has been summed over the ranks. indices: of the classes that means are over,
        coexistence: of those of C-mIoU."""
        found = ["cam", "cam_label_free"] if self._protocol.cam_scales else []
        found += ["cam_aux", "ensemble"] if bool(self._sweeps["cam_aux"].counts.any()) else []
        cams = {name: self._cam_score(name, indices, coexistence) for name in found}
        return EvalResult(
            images=self._images,
            classes=self.classes,
            indices=indices,
            coexistence=tuple(coexistence),
            label_free=_score(self._label_free.iou(), indices, coexistence),
            label_aware=_score(self._label_aware.iou(), indices, coexistence),
            cam=cams.get("cam"),
            cam_label_free=cams.get("cam_label_free"),
            cam_aux=cams.get("cam_aux"),
            ensemble=cams.get("ensemble"),
            foreground_share_true=self._label_free.foreground_shares()[0],
            observed=self._observed(indices, [name for name in ("cam", "cam_aux") if name in cams]),
            image_ap=self._labels.average_precision(),
        )

    def _cam_score(self, name: str, indices: Sequence[int], coexistence: Sequence[int]) -> CamScore:
        sweep, threshold = self._sweeps[name], self._thresholds[name]
        best = sweep.best(indices)
        own = share = None
        if threshold is not None:
            own, share = _score(sweep.own_iou(), indices, coexistence), sweep.own_share()
        return CamScore(_score(best.iou, indices, coexistence), best.threshold, own, threshold, share)

    def _observed(self, indices: Sequence[int], names: Sequence[str]) -> Observed:
        sweeps = {name: (100 * mean_iou(self._sweeps[name].iou(), indices)).tolist() for name in names}
        return self._observer.observed(self._label_free.counts, self._sweeps["cam"].grid, sweeps)


def _score(iou: Tensor, indices: Sequence[int], coexistence: Sequence[int]) -> Score:
    percent = 100 * iou
    c_miou = float(mean_iou(percent, coexistence)) if coexistence else None
    return Score(float(mean_iou(percent, indices)), tuple(percent.tolist()), c_miou)
