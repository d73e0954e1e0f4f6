"""Evaluation of networks on a set of images with masks (METHOD section 7).

Every image is forwarded as eval.protocol says. Only counts of pixels are kept of it, and a score per class, so memory
hardly grows with the set. They are kept where the networks compute: the host reads them once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cosa_fast.data_pipeline.datasets.identity import identity
from cosa_fast.data_pipeline.evaluation_stream import BY_PIL, Loading, evaluation_stream
from cosa_fast.device import compute_type
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.errors import UserError, hint
from cosa_fast.evaluation.counting import Counts
from cosa_fast.evaluation.gathering import finish
from cosa_fast.evaluation.inference import forward_rows, in_one_pass, inference, scaled_rows
from cosa_fast.evaluation.label_only import LabelCounts, LabelResult
from cosa_fast.evaluation.part import Part, Seen, parts_of
from cosa_fast.evaluation.protocol import Thresholds, protocol_of
from cosa_fast.evaluation.result import EvalResult

if TYPE_CHECKING:
    from cosa_fast.config.schema import Config
    from cosa_fast.data_pipeline.datasets.base import ImageDataset
    from cosa_fast.network.build import SegmentationNetwork

AnyResult = EvalResult | LabelResult


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
        """`evaluate_all` of one network."""
        networks = {"on": network}
        return self.evaluate_all(networks, dataset, thresholds=thresholds, limit=limit, progress=progress)["on"]

    def evaluate_all(
        self,
        networks: Mapping[str, SegmentationNetwork],
        dataset: ImageDataset,
        *,
        thresholds: Thresholds = (None, None),
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, AnyResult]:
        """What each of `networks`, which are of one architecture, scores on `dataset`, which needs image labels where
        it has no masks. The images are read once. No gradient is recorded; each module gets its mode (train, eval)
        back.

        thresholds: (ξ, ξ†), at which the CAMs are scored besides their best ones; None where there is none.
        limit: only so many images, evenly spread over the set. progress(done, total) is called after each image of this
        rank.
        Raises UserError for a set with other classes, an image without mask or label, and a file that cannot be read.
        """
        check_classes(dataset, self._classes)
        chosen = spread(len(dataset), limit)
        position = {index: position for position, index in enumerate(chosen)}
        counts = {name: self.counts(dataset.has_masks, chosen, thresholds) for name in networks}
        config, data = self._config.eval, self._config.data
        own = chosen[self._ranks.rank :: self._ranks.size]
        stream = evaluation_stream(dataset, own, config.batch_size, data.mean, data.std, self._device, self._loading)
        done = 0
        with ExitStack() as stack:
            for network in networks.values():
                stack.enter_context(inference(network))
                stack.enter_context(in_one_pass(network, self._device))
            for shown in stream:
                labels = shown.present if dataset.has_masks else _labels(dataset, shown.indices)
                parts = parts_of([position[index] for index in shown.indices], labels, shown.truths)
                self.look(networks, counts, shown.images, parts)
                for _ in shown.indices:
                    done += 1
                    if progress is not None:
                        progress(done, len(own))
        results, known = {}, identity(dataset)
        for name, each in counts.items():
            finish(each.counted(), self._ranks)
            result = each.result() if isinstance(each, LabelCounts) else each.result(self._indices, self._coexistence)
            results[name] = replace(result, set_size=len(dataset), identity=known)
        return results

    def counts(self, has_masks: bool, chosen: Sequence[int], thresholds: Thresholds) -> Counts | LabelCounts:
        """Nothing counted yet, of the images at `chosen` of a set."""
        if not has_masks:
            return LabelCounts(self._classes, self._protocol, thresholds[0], chosen, self._device)
        names, step = ("background", *self._classes), self._config.eval.cam_step
        return Counts(names, step, self._protocol, thresholds, chosen, self._device)

    def look(
        self,
        networks: Mapping[str, SegmentationNetwork],
        counts: Mapping[str, Counts | LabelCounts],
        images: Tensor,
        parts: Sequence[Part],
    ) -> None:
        """Forward a batch (N, 3, H, W) through each network, and count by its name. On a GPU the host waits for
        nothing."""
        segmentation, protocol = self._config.eval, self._protocol
        scales = (*segmentation.scales, *protocol.cam_scales)
        flip, stride = segmentation.flip or protocol.cam_flip, next(iter(networks.values())).stride
        rows = scaled_rows(protocol.images(images), scales, flip=flip, stride=stride)
        for name, network in networks.items():
            outputs = forward_rows(network, rows, segmentation.scales, self._dtype)
            for part in parts:
                counts[name].add(Seen(part, outputs, len(images)), segmentation.scales, segmentation.flip)


def _labels(dataset: ImageDataset, indices: Sequence[int]) -> Tensor:
    """(N, C) bool, from the label file."""
    return torch.from_numpy(np.stack([dataset.labels(index) for index in indices])) > 0


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
