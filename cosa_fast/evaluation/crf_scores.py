"""What the CRF does to a network's segmentations: mIoU before and after, time, and how far its two methods agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.evaluation_stream import Loading, Shown, evaluation_stream
from cosa_fast.data_pipeline.views.pixels import denormalise_pixels
from cosa_fast.device import compute_type
from cosa_fast.evaluation.cleaning import Cleaner
from cosa_fast.evaluation.inference import class_probabilities, forward_scales, inference, of_image
from cosa_fast.evaluation.metrics import ConfusionMatrix, mean_iou
from cosa_fast.evaluation.result import format_table
from cosa_fast.network.build import SegmentationNetwork


@dataclass(frozen=True)
class CrfResult:
    """Of `images` images. classes: the K names, background first; indices: those of them that the means are over.

    iou: in percent per class, of the label-free segmentation as "free" and of what each method made of it; empty where
    there are no masks. changed: by each method, the share of the pixels in [0, 1]. seconds: of each for an image.
    agreement: share of the pixels on which both methods agree; None for one alone. at_a_time: images in parallel.
    """

    images: int
    classes: tuple[str, ...]
    indices: tuple[int, ...]
    iou: dict[str, tuple[float, ...]]
    changed: dict[str, float]
    seconds: dict[str, float]
    agreement: float | None
    at_a_time: int

    def summary(self) -> dict[str, float]:
        """seg_label_free and seg_crf_METHOD, mIoU in percent; crf_METHOD_changed and crf_agreement in [0, 1];
        crf_METHOD_seconds."""
        names = {"free": "seg_label_free"}
        values = {names.get(name, f"seg_crf_{name}"): self._miou(iou) for name, iou in self.iou.items()}
        for method, share in self.changed.items():
            values |= {f"crf_{method}_changed": share, f"crf_{method}_seconds": self.seconds[method]}
        return values if self.agreement is None else {**values, "crf_agreement": self.agreement}

    def table(self) -> str:
        """For a terminal, without a final newline: a column per method, and a line of its time and effect."""
        lines = []
        if self.iou:
            groups = {"free": "segmentation"}
            headings = [(groups.get(name, "with CRF"), name) for name in self.iou]
            rows = [(self.classes[k], [iou[k] for iou in self.iou.values()]) for k in self.indices]
            rows = [row for row in rows if any(value == value for value in row[1])]
            rows.append(("mIoU", [self._miou(iou) for iou in self.iou.values()]))
            lines.append(format_table(headings, rows))
        for method, seconds in self.seconds.items():
            parallel = f", {self.at_a_time} at a time" if self.at_a_time > 1 else ""
            lines.append(
                f"CRF {method}: {seconds:.2f} s an image{parallel}; changed {self.changed[method]:.1%} of pixels"
            )
        if self.agreement is not None:
            lines.append(f"both agree on {self.agreement:.2%} of pixels")
        return "\n".join(lines)

    def _miou(self, iou: Sequence[float]) -> float:
        return float(mean_iou(torch.tensor(iou, dtype=torch.float64), self.indices))


class _Counts:
    def __init__(self, methods: Sequence[str], num_classes: int) -> None:
        self.matrices = {name: ConfusionMatrix(num_classes, "cpu") for name in ("free", *methods)}
        self.seconds = dict.fromkeys(methods, 0.0)
        self.changed = dict.fromkeys(methods, 0)
        self.agreed = 0
        self.pixels = 0


def score_crf(
    network: SegmentationNetwork,
    dataset: ImageDataset,
    chosen: Sequence[int],
    config: Config,
    indices: Sequence[int],
    cleaner: Cleaner,
    loading: Loading,
    progress: Callable[[int, int], None],
) -> CrfResult:
    """Clean the label-free segmentations of the `chosen` images by every method of `cleaner`, and count.

    The CRF's input is the softmax of the mean logits over eval.scales and mirror. indices: of the classes that the
    means are over, 0 for background. progress(done, total) is called after each image.
    """
    device = next(network.parameters()).device
    data = config.data
    counts = _Counts(cleaner.methods, len(dataset.classes) + 1)
    stream = evaluation_stream(dataset, chosen, config.eval.batch_size, data.mean, data.std, device, loading)
    with inference(network):
        items = _segmented(network, stream, config, device)
        for done, (truth_and_labels, cleaned) in enumerate(cleaner.map(items), 1):
            truth, before = truth_and_labels
            after = {name: torch.from_numpy(each.labels.astype("int64")) for name, each in cleaned.items()}
            for name, labels in {"free": before, **after}.items():
                counts.matrices[name].update(labels, truth)
            for name, each in cleaned.items():
                counts.seconds[name] += each.seconds
                counts.changed[name] += int((after[name] != before).sum())
            if len(after) > 1:
                first, second = after.values()
                counts.agreed += int((first == second).sum())
            counts.pixels += before.numel()
            progress(done, len(chosen))
    has_truth = dataset.has_masks
    return CrfResult(
        images=len(chosen),
        classes=("background", *dataset.classes),
        indices=tuple(indices),
        iou={n: tuple((100 * m.iou()).tolist()) for n, m in counts.matrices.items()} if has_truth else {},
        changed={name: count / counts.pixels for name, count in counts.changed.items()},
        seconds={name: total / len(chosen) for name, total in counts.seconds.items()},
        agreement=counts.agreed / counts.pixels if len(cleaner.methods) > 1 else None,
        at_a_time=cleaner.processes,
    )


def _segmented(
    network: SegmentationNetwork, stream: Iterator[Shown], config: Config, device: torch.device
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:
    """((mask, label-free segmentation) on the CPU, probabilities, image as uint8) of each image."""
    scales, flip = config.eval.scales, config.eval.flip
    dtype = compute_type(config.run.precision, device)
    for _, images, truths, _ in stream:
        outputs = forward_scales(network, images, scales, flip=flip, seg_scales=scales, dtype=dtype)
        pixels = denormalise_pixels(images, config.data.mean, config.data.std)
        for number, truth in enumerate(truths):
            of_one = of_image(outputs, number, len(images))
            segs = [of_one[scale].segmentation() for scale in scales]
            probabilities = class_probabilities(segs, (truth.shape[0], truth.shape[1]))
            yield (truth.cpu(), probabilities.argmax(0).cpu()), probabilities, pixels[number]
