"""Evaluation of networks on a set of images with masks (METHOD section 7).

Every image is forwarded at its own size. Only counts of pixels are kept of it, so memory does not grow with the set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosa_fast.data_pipeline.evaluation_stream import BY_PIL, Loading, evaluation_stream
from cosa_fast.device import compute_type
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.errors import UserError, hint
from cosa_fast.evaluation.cam import classes_in, normalised_cams, strongest
from cosa_fast.evaluation.inference import (
    allowed_classes,
    best_class,
    forward_scales,
    inference,
    of_image,
    summed_logits,
)
from cosa_fast.evaluation.metrics import ConfusionMatrix, ThresholdSweep, mean_iou, threshold_grid
from cosa_fast.evaluation.result import CamScore, EvalResult, Score

if TYPE_CHECKING:
    from cosa_fast.config.schema import Config
    from cosa_fast.data_pipeline.datasets.base import ImageDataset
    from cosa_fast.network.model import CoSANet, Outputs

Thresholds = tuple[float | None, float | None]


class Evaluator:
    """Evaluates networks of C classes as a configuration says.

    The segmentation uses eval.scales and eval.flip; the CAMs use those of the teacher section. A scale that both name
    is computed once. run.precision is the type of the network's matrix products; everything after them is float32.

    classes: the C foreground names. device: where the networks are. loading: how the images are read. ranks: they share
    the images out among themselves, and each of them returns the result over all images.
    Raises UserError for class names in eval.classes or eval.coexistence that are not among `classes`.
    """

    def __init__(
        self,
        config: Config,
        classes: Sequence[str],
        device: torch.device | str,
        *,
        loading: Loading = BY_PIL,
        ranks: Ranks = ALONE,
    ) -> None:
        self._config = config
        self._classes = tuple(classes)
        self._device = torch.device(device)
        self._dtype = compute_type(config.run.precision, self._device)
        self._loading = loading
        self._ranks = ranks
        chosen = self._classes if config.eval.classes is None else config.eval.classes
        self._indices = (0, *class_indices(chosen, classes, "eval.classes"))
        self._coexistence = class_indices(config.eval.coexistence, classes, "eval.coexistence")

    def evaluate(
        self,
        network: CoSANet,
        dataset: ImageDataset,
        *,
        thresholds: Thresholds = (None, None),
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvalResult:
        """What `network` scores on `dataset`. No gradient is recorded; each module gets its mode (train, eval) back.

        thresholds: (ξ, ξ†), at which the CAMs are scored besides their best ones; None where there is none.
        limit: only so many images, evenly spread over the set. progress(done, total) is called after each image.
        Raises UserError for a set without masks or with other classes, and for a file that cannot be read.
        """
        _check_dataset(dataset, self._classes)
        chosen = _spread(len(dataset), limit)
        config, data = self._config.eval, self._config.data
        counts = _Counts(("background", *self._classes), config.cam_step, thresholds, self._device)
        own = chosen[self._ranks.rank :: self._ranks.size]
        stream = evaluation_stream(dataset, own, config.batch_size, data.mean, data.std, self._device, self._loading)
        done = 0
        with inference(network):
            for images, truths in stream:
                outputs = self._forward(network, images)
                for number, truth in enumerate(truths):
                    self._count(of_image(outputs, number, len(images)), truth, counts)
                    done += 1
                    if progress is not None:
                        progress(done, len(chosen))
        for tensor in counts.tensors():
            self._ranks.sum_(tensor)
        return counts.result(len(chosen), self._indices, self._coexistence)

    def _forward(self, network: CoSANet, images: Tensor) -> dict[float, Outputs]:
        segmentation, cams = self._config.eval, self._config.teacher
        return forward_scales(
            network,
            images,
            (*segmentation.scales, *cams.scales),
            flip=segmentation.flip or cams.flip,
            seg_scales=segmentation.scales,
            dtype=self._dtype,
        )

    def _count(self, outputs: dict[float, Outputs], truth: Tensor, counts: _Counts) -> None:
        """Add one image: its outputs by scale, its mask (H, W) uint8."""
        segmentation, cams = self._config.eval, self._config.teacher
        present = classes_in(truth)
        counts.add_segmentation([outputs[scale] for scale in segmentation.scales], segmentation.flip, present, truth)
        counts.add_cams([outputs[scale] for scale in cams.scales], cams.flip, present, truth)


class _CamCounts:
    """Counts of the CPLs of one map (M', M†' or their mean)."""

    def __init__(self, num_classes: int, step: float, threshold: float | None, device: torch.device | str) -> None:
        self.threshold = threshold
        self.sweep = ThresholdSweep(num_classes, threshold_grid(step), device)
        self.at_threshold = ConfusionMatrix(num_classes, device)

    def add(self, maps: Tensor, present: Tensor, truth: Tensor) -> None:
        confidence, category = strongest(maps, present)
        self.sweep.update(confidence, category, truth)
        if self.threshold is not None:
            self.at_threshold.update(category * (confidence >= self.threshold), truth)

    def tensors(self) -> list[Tensor]:
        return [self.sweep.counts, self.at_threshold.counts]

    def score(self, indices: Sequence[int], coexistence: Sequence[int]) -> CamScore:
        best = self.sweep.best(indices)
        own = share = None
        if self.threshold is not None:
            own = _score(self.at_threshold.iou(), indices, coexistence)
            share = self.at_threshold.foreground_shares()[1]
        return CamScore(_score(best.iou, indices, coexistence), best.threshold, own, self.threshold, share)


class _Counts:
    """Everything that is counted over the set."""

    def __init__(
        self,
        classes: tuple[str, ...],
        step: float,
        thresholds: Thresholds,
        device: torch.device | str,
    ) -> None:
        num_classes = len(classes)

        def cam(threshold: float | None) -> _CamCounts:
            return _CamCounts(num_classes, step, threshold, device)

        self.classes = classes
        main, aux = (None if value is None else float(value) for value in thresholds)
        self.label_free = ConfusionMatrix(num_classes, device)
        self.label_aware = ConfusionMatrix(num_classes, device)
        self.cam, self.cam_label_free, self.cam_aux = cam(main), cam(main), cam(aux)
        self.ensemble = cam(None if main is None or aux is None else (main + aux) / 2)

    def add_segmentation(self, outputs: Sequence[Outputs], flip: bool, present: Tensor, truth: Tensor) -> None:
        """outputs: one per scale of the segmentation; present: (P,) in 0..C-1, the true label; truth: (H, W) uint8."""
        segs = [_rows(output.seg, flip) for output in outputs if output.seg is not None]
        allowed = allowed_classes(present, len(self.classes))
        for rows, logits in summed_logits(segs, (truth.shape[0], truth.shape[1])):
            self.label_free.update(best_class(logits), truth[rows])
            self.label_aware.update(best_class(logits, allowed), truth[rows])

    def add_cams(self, outputs: Sequence[Outputs], flip: bool, present: Tensor, truth: Tensor) -> None:
        """outputs: one per scale of the CAMs; present and truth as above."""
        size = (truth.shape[0], truth.shape[1])
        cams = [_rows(output.cam, flip) for output in outputs]
        maps = normalised_cams(cams, present, size)
        self.cam.add(maps, present, truth)
        predicted = predicted_classes([_rows(output.logits, flip) for output in outputs])
        self.cam_label_free.add(normalised_cams(cams, predicted, size), predicted, truth)
        aux = [_rows(output.cam_aux, flip) for output in outputs if output.cam_aux is not None]
        if aux:
            maps_aux = normalised_cams(aux, present, size)
            self.cam_aux.add(maps_aux, present, truth)
            self.ensemble.add((maps + maps_aux) / 2, present, truth)

    def tensors(self) -> list[Tensor]:
        """All that is counted, to be summed over ranks."""
        cams = (self.cam, self.cam_label_free, self.cam_aux, self.ensemble)
        return [self.label_free.counts, self.label_aware.counts, *(counts for cam in cams for counts in cam.tensors())]

    def result(self, images: int, indices: tuple[int, ...], coexistence: Sequence[int]) -> EvalResult:
        has_aux = bool(self.cam_aux.sweep.counts.any())
        return EvalResult(
            images=images,
            classes=self.classes,
            indices=indices,
            label_free=_score(self.label_free.iou(), indices, coexistence),
            label_aware=_score(self.label_aware.iou(), indices, coexistence),
            cam=self.cam.score(indices, coexistence),
            cam_label_free=self.cam_label_free.score(indices, coexistence),
            cam_aux=self.cam_aux.score(indices, coexistence) if has_aux else None,
            ensemble=self.ensemble.score(indices, coexistence) if has_aux else None,
            foreground_share_true=self.label_free.foreground_shares()[0],
        )


def _score(iou: Tensor, indices: Sequence[int], coexistence: Sequence[int]) -> Score:
    percent = 100 * iou
    c_miou = float(mean_iou(percent, coexistence)) if coexistence else None
    return Score(float(mean_iou(percent, indices)), tuple(percent.tolist()), c_miou)


def predicted_classes(logits: Sequence[Tensor]) -> Tensor:
    """(P,) int64 indices of the classes that the classifier finds, with a mean logit above 0 (σ > ½). logits: one
    (1 or 2, C) per scale."""
    return (torch.cat(list(logits)).mean(0) > 0).nonzero()[:, 0]


def _rows(maps: Tensor, flip: bool) -> Tensor:
    """Both rows, or without flip that of the image itself (segmentation and CAMs may differ in what they flip)."""
    return maps if flip else maps[:1]


def _check_dataset(dataset: ImageDataset, classes: Sequence[str]) -> None:
    if not dataset.has_masks:
        raise UserError("the evaluation set has no masks; choose another data.val_split or data.root")
    if tuple(dataset.classes) != tuple(classes):
        raise UserError(
            f"the evaluation set has the classes {_shorten(dataset.classes)}, the network {_shorten(classes)}; "
            "set data.root or data.classes to the set that the network was trained for"
        )


def _shorten(names: Sequence[str]) -> str:
    return f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''} ({len(names)})"


def _spread(length: int, limit: int | None) -> list[int]:
    count = length if limit is None else min(limit, length)
    if count < 1:
        raise UserError("nothing to evaluate: the set is empty, or the limit is below 1")
    return [position * length // count for position in range(count)]


def class_indices(names: Sequence[str], classes: Sequence[str], key: str) -> list[int]:
    """Mask indices (1..C) of foreground class names; UserError naming `key` and the nearest class for another name."""
    for name in names:
        if name not in classes:
            raise UserError(
                f"{key}: there is no class {name!r}{hint(name, classes)}; wanted some of {', '.join(classes)}"
            )
    return [classes.index(name) + 1 for name in names]
