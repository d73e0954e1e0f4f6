"""The training pipeline on NVIDIA DALI: the batches of `torch_pipeline.py`, decoded and augmented on the GPU; without
one decoded by PIL in threads, and augmented by DALI on the CPU.

DALI draws nothing: all parameters come from `views/parameters.py` through an external source.
"""

from collections.abc import Iterator
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def
from torch import Tensor

from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.dali.feed import Source, decoded_by_pil, device_id, images_of, run_graph
from cosa_fast.data_pipeline.dali.operations import apply_colour, blur, cut, to_crop
from cosa_fast.data_pipeline.dali.samples import Inputs, Sample, Samples, graph_inputs
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.stream import Positions, SkipNotes, Unreadable, at_least
from cosa_fast.data_pipeline.views.parameters import AugmentConfig, Box

# Images of one run of the graph: several small batches together keep all threads busy.
RUN = 32


class DaliPipeline:
    """An endless stream of augmented batches over `dataset`, with the contract of `TorchPipeline`: the same images,
    labels, geometry and valid pixels; colours up to the differences in docs/data.md.

    device: where the batches are wanted; on a GPU the decoder and the operators work there too. threads: so many of
    DALI's on the CPU, and as many that read files. prefetch: so many runs of the graph (RUN images each, or one batch
    where that is larger) are kept ready by DALI, and as many are read ahead for it. Neither changes the stream.
    On the CPU PIL decodes; on a GPU it decodes what DALI's decoder would read otherwise. The tensors of a batch are
    DALI's own, handed over without a copy; they live as long as somebody holds them.
    ValueError for batch_size, threads or prefetch < 1 or a negative seed or start.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        config: AugmentConfig,
        batch_size: int,
        seed: int,
        *,
        device: torch.device,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
        threads: int = 1,
        prefetch: int = 2,
        with_truth: bool = False,
        unreadable: Unreadable = "stop",
    ) -> None:
        at_least(0, seed=seed)
        at_least(1, threads=threads, prefetch=prefetch)
        self._positions = Positions.of(batch_size, start, rank, ranks)
        self._samples = Samples(dataset, config, seed, with_truth, unreadable, decoded_by_pil(device))
        self._device, self._threads, self._prefetch = device, threads, prefetch
        self._group = max(1, RUN // self._positions.length)
        self._notes = SkipNotes()

    def __iter__(self) -> Iterator[Batch]:
        graph = run_graph(self._source, self._build, self._device, self._samples.by_pil)
        for batches, outputs in graph:
            weak, strong = (torch.from_dlpack(output.as_tensor()) for output in outputs)
            lengths = [len(samples) for samples in batches]
            for samples, *views in zip(batches, weak.split(lengths), strong.split(lengths), strict=True):
                yield self._batch(samples, *views)

    def _source(self, used: int) -> Source[Sample]:
        size = self._samples.config.crop_size
        return Source(
            self._samples.at,
            self._positions.after(used),
            lambda samples: graph_inputs(samples, size),
            self._threads,
            self._prefetch,
            self._group,
        )

    def _build(self, source: Source[Sample]) -> Any:
        return pipeline_def(
            batch_size=self._positions.length * self._group,
            num_threads=self._threads,
            device_id=device_id(self._device),
            prefetch_queue_depth=self._prefetch,
            exec_dynamic=True,  # its outputs are handed over, not reused
            enable_conditionals=True,
        )(_crops)(source, self._samples.config, self._device.type == "cuda")

    def _batch(self, samples: list[Sample], weak: Tensor, strong: Tensor) -> Batch:
        self._notes.say([problem for sample in samples for problem in sample.problems])
        truths = [sample.truth for sample in samples if sample.truth is not None]
        size = self._samples.config.crop_size
        return Batch(
            weak=weak,
            strong=strong,
            # Without waiting: a plain copy would first let the GPU finish the step before.
            labels=torch.stack([sample.labels for sample in samples]).to(self._device, non_blocking=True),
            valid=_inside([sample.parameters.box for sample in samples], size, self._device),
            ids=[sample.id for sample in samples],
            truth=torch.stack(truths).to(self._device, non_blocking=True) if truths else None,
        )


def views(source: Any, gpu: bool) -> tuple[Any, Any, Inputs]:
    """In a graph, fed by `source` with `graph_inputs`: the weak and the strong view, (height, width, 3) uint8 each and
    without padding, and the inputs.
    """
    inputs = Inputs(*fn.external_source(source=source, num_outputs=len(Inputs._fields), batch=True))
    weak = cut(images_of(inputs.content, gpu), inputs.start, inputs.end, inputs.size)
    weak = blur(weak, inputs.blurred, inputs.row, inputs.column)
    strong = apply_colour(weak, inputs.operation, inputs.factor, inputs.threshold, inputs.bits, inputs.kernel)
    return weak, strong, inputs


def _crops(source: Source[Sample], config: AugmentConfig, gpu: bool) -> tuple[Any, Any]:
    """The graph: (weak, strong), (3, crop, crop) float32 each."""
    *both, inputs = views(source, gpu)
    return tuple(to_crop(view, inputs.position, config) for view in both)


def _inside(boxes: list[Box], size: int, device: torch.device) -> Tensor:
    """(B, size, size) bool on `device`: True inside each box."""
    top, left, height, width = torch.tensor(boxes).to(device, non_blocking=True)[:, :, None].unbind(1)
    place = torch.arange(size, device=device)
    rows, columns = ((place >= first) & (place < first + length) for first, length in ((top, height), (left, width)))
    return rows[:, :, None] & columns[:, None, :]
