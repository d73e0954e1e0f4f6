"""Evaluation of networks on a set of images with masks (METHOD section 7).

Every image is forwarded as eval.protocol says. Only counts of pixels are kept of it, and a score per class, so memory
hardly grows with the set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosa_fast.data_pipeline.evaluation_stream import BY_PIL, Loading, evaluation_stream
from cosa_fast.device import compute_type
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.errors import UserError, hint
from cosa_fast.evaluation.cam import classes_in, strongest
from cosa_fast.evaluation.inference import (
    allowed_classes,
    best_class,
    forward_scales,
    inference,
    of_image,
)
from cosa_fast.evaluation.label_only import LabelCounts, LabelResult
from cosa_fast.evaluation.metrics import ConfusionMatrix, ThresholdSweep, average_precision, mean_iou, threshold_grid
from cosa_fast.evaluation.observed import Observed, Observer
from cosa_fast.evaluation.protocol import Protocol, Thresholds, protocol_of
from cosa_fast.evaluation.result import CamScore, EvalResult, Score

if TYPE_CHECKING:
    from cosa_fast.config.schema import Config
    from cosa_fast.data_pipeline.datasets.base import ImageDataset
    from cosa_fast.network.build import SegmentationNetwork
    from cosa_fast.network.model import Outputs

AnyResult = EvalResult | LabelResult
# Index of an image in its set, its mask (H, W) uint8, all 255 where there is none, and its outputs by scale.
Seen = tuple[int, Tensor, "dict[float, Outputs]"]


class Evaluator:
    """Evaluates networks of C classes as a configuration says.

    The segmentation uses eval.scales and eval.flip; the CAMs use those of the teacher section, or of eval where
    eval.protocol says so. A scale that both name is computed once. run.precision is the type of the network's matrix
    products; everything after them is float32.

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
        self._protocol = protocol_of(config)
        chosen = self._classes if config.eval.classes is None else config.eval.classes
        self._indices = (0, *class_indices(chosen, classes, "eval.classes"))
        self._coexistence = class_indices(config.eval.coexistence, classes, "eval.coexistence")

    def evaluate(
        self,
        network: SegmentationNetwork,
        dataset: ImageDataset,
        *,
        thresholds: Thresholds = (None, None),
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> AnyResult:
        """What `network` scores on `dataset`, which needs image labels where it has no masks. No gradient is recorded;
        each module gets its mode (train, eval) back.

        thresholds: (ξ, ξ†), at which the CAMs are scored besides their best ones; None where there is none.
        limit: only so many images, evenly spread over the set. progress(done, total) is called after each image of this
        rank.
        Raises UserError for a set with other classes, an image without mask or label, and a file that cannot be read.
        """
        check_classes(dataset, self._classes)
        chosen = spread(len(dataset), limit)
        with inference(network):
            outputs = self._outputs(network, dataset, chosen, progress)
            if dataset.has_masks:
                result: AnyResult = self._by_masks(outputs, chosen, thresholds)
            else:
                result = self._by_labels(outputs, chosen, thresholds[0], dataset)
        return replace(result, set_size=len(dataset))

    def _outputs(
        self,
        network: SegmentationNetwork,
        dataset: ImageDataset,
        chosen: Sequence[int],
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[Seen]:
        """Every image of this rank; those of one size go through the network together."""
        config, data = self._config.eval, self._config.data
        own = chosen[self._ranks.rank :: self._ranks.size]
        stream = evaluation_stream(dataset, own, config.batch_size, data.mean, data.std, self._device, self._loading)
        done = 0
        for indices, images, truths in stream:
            outputs = self._forward(network, images)
            for number, (index, truth) in enumerate(zip(indices, truths, strict=True)):
                yield index, truth, of_image(outputs, number, len(images))
                done += 1
                if progress is not None:
                    progress(done, len(own))

    def _by_masks(self, outputs: Iterator[Seen], chosen: Sequence[int], thresholds: Thresholds) -> EvalResult:
        names, step = ("background", *self._classes), self._config.eval.cam_step
        counts = _Counts(names, step, self._protocol, thresholds, self._device, chosen)
        for index, truth, output in outputs:
            with counts.observer.image(index, counts.label_free):
                self._count(output, index, truth, counts)
        for tensor in counts.tensors():
            self._ranks.sum_(tensor)
        return counts.result(len(chosen), self._indices, self._coexistence)

    def _by_labels(
        self, outputs: Iterator[Seen], chosen: Sequence[int], threshold: float | None, dataset: ImageDataset
    ) -> LabelResult:
        has_cams = bool(self._protocol.cam_scales)
        counts = LabelCounts(self._classes, len(chosen), threshold, self._device, has_cams=has_cams)
        observer = Observer(chosen, self._device)
        position = {index: position for position, index in enumerate(chosen)}
        for index, truth, output in outputs:
            present = torch.from_numpy(dataset.labels(index)).nonzero()[:, 0].to(self._device)
            with observer.image(index, counts.agreement):
                confidence, category = self._count_by_labels(output, position[index], present, truth, counts)
            if has_cams:
                observer.add_map("cam", confidence, category, truth)
        for tensor in (*counts.tensors(), *observer.tensors()):
            self._ranks.sum_(tensor)
        result = counts.result()
        return replace(result, observed=observer.observed(counts.agreement.counts)) if has_cams else result

    def _count_by_labels(
        self,
        outputs: dict[float, Outputs],
        position: int,
        present: Tensor,
        truth: Tensor,
        counts: LabelCounts,
    ) -> tuple[Tensor, Tensor]:
        """Returns ν and ŷ, (H, W) as the truth, of which nothing but the size is used; 0 for a network without CAM."""
        segmentation, protocol = self._config.eval, self._protocol
        size = (truth.shape[0], truth.shape[1])
        logits = [_rows(outputs[scale].logits, protocol.cam_flip) for scale in protocol.score_scales]
        counts.add_labels(position, logits, present)
        cams = [_rows(outputs[scale].cam, protocol.cam_flip) for scale in protocol.cam_scales]
        gated = present if cams else present[:0]
        maps = protocol.maps(cams, gated, size) if cams else torch.zeros(0, *size, device=truth.device)
        confidence, category = strongest(maps, gated)
        segs = [_rows(outputs[scale].segmentation(), segmentation.flip) for scale in segmentation.scales]
        for rows, summed in protocol.logits(segs, size):
            counts.add_pixels(confidence[rows], category[rows], best_class(summed))
        return confidence, category

    def _forward(self, network: SegmentationNetwork, images: Tensor) -> dict[float, Outputs]:
        segmentation, protocol = self._config.eval, self._protocol
        return forward_scales(
            network,
            protocol.images(images),
            (*segmentation.scales, *protocol.cam_scales),
            flip=segmentation.flip or protocol.cam_flip,
            seg_scales=segmentation.scales,
            dtype=self._dtype,
        )

    def _count(self, outputs: dict[float, Outputs], index: int, truth: Tensor, counts: _Counts) -> None:
        """Add one image: its outputs by scale, its index in the set, its mask (H, W) uint8."""
        segmentation = self._config.eval
        present = classes_in(truth)
        counts.add_segmentation([outputs[scale] for scale in segmentation.scales], segmentation.flip, present, truth)
        counts.add_cams(outputs, present, truth)
        counts.add_labels(index, outputs, present)


class _CamCounts:
    """Counts of the CPLs of one map (M', M†' or their mean)."""

    def __init__(self, num_classes: int, step: float, threshold: float | None, device: torch.device | str) -> None:
        self.threshold = threshold
        self.sweep = ThresholdSweep(num_classes, threshold_grid(step), device)
        self.at_threshold = ConfusionMatrix(num_classes, device)

    def add(self, maps: Tensor, present: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ν and ŷ, (H, W) each."""
        confidence, category = strongest(maps, present)
        self.sweep.update(confidence, category, truth)
        if self.threshold is not None:
            self.at_threshold.update(category * (confidence >= self.threshold), truth)
        return confidence, category

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
        protocol: Protocol,
        thresholds: Thresholds,
        device: torch.device,
        images: Sequence[int],
    ) -> None:
        num_classes = len(classes)
        self._protocol = protocol

        def cam(threshold: float | None) -> _CamCounts:
            return _CamCounts(num_classes, step, threshold, device)

        self.classes = classes
        main, aux = (None if value is None else float(value) for value in protocol.thresholds(thresholds))
        self.label_free = ConfusionMatrix(num_classes, device)
        self.label_aware = ConfusionMatrix(num_classes, device)
        self.cam, self.cam_label_free, self.cam_aux = cam(main), cam(main), cam(aux)
        self.ensemble = cam(None if main is None or aux is None else (main + aux) / 2)
        self.observer = Observer(images, device)
        self._position = {index: position for position, index in enumerate(images)}
        self._scores = torch.zeros(len(images), num_classes - 1, dtype=torch.float64, device=device)
        self._present = torch.zeros_like(self._scores)

    def add_labels(self, index: int, outputs: dict[float, Outputs], present: Tensor) -> None:
        """index: of the image in its set; outputs: by scale; present: (P,) in 0..C-1, the true label."""
        logits = [self._rows(outputs[scale].logits) for scale in self._protocol.score_scales]
        self._scores[self._position[index]] = torch.cat(logits).double().mean(0)
        self._present[self._position[index], present] = 1

    def add_segmentation(self, outputs: Sequence[Outputs], flip: bool, present: Tensor, truth: Tensor) -> None:
        """outputs: one per scale of the segmentation; present: (P,) in 0..C-1, the true label; truth: (H, W) uint8."""
        segs = [_rows(output.seg, flip) for output in outputs if output.seg is not None]
        allowed = allowed_classes(present, len(self.classes))
        for rows, logits in self._protocol.logits(segs, (truth.shape[0], truth.shape[1])):
            self.label_free.update(best_class(logits), truth[rows])
            self.label_aware.update(best_class(logits, allowed), truth[rows])

    def add_cams(self, outputs: dict[float, Outputs], present: Tensor, truth: Tensor) -> None:
        """outputs: by scale; present and truth as above. Nothing for a network without CAM."""
        protocol, size = self._protocol, (truth.shape[0], truth.shape[1])
        if not protocol.cam_scales:
            return
        own = [outputs[scale] for scale in protocol.cam_scales]
        cams = [self._rows(output.cam) for output in own]
        maps = protocol.maps(cams, present, size)
        self.observer.add_map("cam", *self.cam.add(maps, present, truth), truth)
        predicted = predicted_classes([self._rows(output.logits) for output in own])
        self.cam_label_free.add(protocol.maps(cams, predicted, size), predicted, truth)
        aux = [self._rows(outputs[scale].cam_aux) for scale in protocol.aux_scales if own[0].cam_aux is not None]
        if aux:
            maps_aux = protocol.maps(aux, present, size)
            self.observer.add_map("cam_aux", *self.cam_aux.add(maps_aux, present, truth), truth)
            self.ensemble.add((maps + maps_aux) / 2, present, truth)

    def _rows(self, maps: Any) -> Tensor:
        return _rows(maps, self._protocol.cam_flip)

    def tensors(self) -> list[Tensor]:
        """All that is counted, to be summed over ranks."""
        cams = (self.cam, self.cam_label_free, self.cam_aux, self.ensemble)
        counted = [counts for cam in cams for counts in cam.tensors()]
        own = [self.label_free.counts, self.label_aware.counts, self._scores, self._present]
        return [*own, *counted, *self.observer.tensors()]

    def result(self, images: int, indices: tuple[int, ...], coexistence: Sequence[int]) -> EvalResult:
        has_aux, has_cams = bool(self.cam_aux.sweep.counts.any()), bool(self._protocol.cam_scales)
        return EvalResult(
            images=images,
            classes=self.classes,
            indices=indices,
            label_free=_score(self.label_free.iou(), indices, coexistence),
            label_aware=_score(self.label_aware.iou(), indices, coexistence),
            cam=self.cam.score(indices, coexistence) if has_cams else None,
            cam_label_free=self.cam_label_free.score(indices, coexistence) if has_cams else None,
            cam_aux=self.cam_aux.score(indices, coexistence) if has_aux else None,
            ensemble=self.ensemble.score(indices, coexistence) if has_aux else None,
            foreground_share_true=self.label_free.foreground_shares()[0],
            observed=self._observed(indices, has_cams, has_aux),
            image_ap=tuple((100 * average_precision(self._scores, self._present > 0)).tolist()),
        )

    def _observed(self, indices: Sequence[int], has_cams: bool, has_aux: bool) -> Observed:
        cams = {"cam": self.cam} if has_cams else {}
        cams |= {"cam_aux": self.cam_aux} if has_aux else {}
        sweep = {name: (100 * mean_iou(cam.sweep.iou(), indices)).tolist() for name, cam in cams.items()}
        return self.observer.observed(self.label_free.counts, self.cam.sweep.grid, sweep)


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


def check_classes(dataset: ImageDataset, classes: Sequence[str]) -> None:
    """UserError where a set has other classes than a network."""
    if tuple(dataset.classes) != tuple(classes):
        raise UserError(
            f"the evaluation set has the classes {_shorten(dataset.classes)}, the network {_shorten(classes)}; "
            "set data.root or data.classes to the set that the network was trained for"
        )


def _shorten(names: Sequence[str]) -> str:
    return f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''} ({len(names)})"


def spread(length: int, limit: int | None) -> list[int]:
    """Indices of `limit` images (None: all), evenly spread over a set of that length; UserError where that is none."""
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
