"""The training pipeline on NVIDIA DALI: the batches of `torch_pipeline.py`, decoded and augmented by DALI, on the GPU
where there is one.

DALI draws nothing: all parameters come from `augment.py` through an external source.
"""

from collections.abc import Iterator
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from cosa_fast.data_pipeline.augment import AugmentConfig, Box
from cosa_fast.data_pipeline.base import ImageDataset
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.dali_operations import apply_colour, blur, cut, decode, to_crop
from cosa_fast.data_pipeline.dali_source import Sample, Samples, Source
from cosa_fast.data_pipeline.stream import Positions, SkipNotes, Unreadable, at_least

INPUTS = 13  # of dali_source.arguments


class DaliPipeline:
    """An endless stream of augmented batches over `dataset`, with the contract of `TorchPipeline`: the same images,
    labels, geometry and valid pixels; colours up to the differences in docs/data.md.

    device: where the batches are wanted. On a GPU its decoder and operators work there too.
    threads: CPU threads of DALI, and as many that read files. prefetch: batches that DALI keeps ready, and as many read
    ahead for it. Neither changes the stream.
    A file that DALI cannot decode, or not as PIL does, is decoded by PIL. The tensors of a batch are DALI's own, handed
    over without a copy; they live as long as somebody holds them.
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
        self._samples = Samples(dataset, config, seed, with_truth, unreadable, by_pil=set())
        self._device, self._threads, self._prefetch = device, threads, prefetch
        self._notes = SkipNotes()

    def __iter__(self) -> Iterator[Batch]:
        positions = self._positions
        while True:
            used = 0
            for batch in self._until_undecodable(positions):
                used += 1
                yield batch
            positions = positions.after(used)

    def _until_undecodable(self, positions: Positions) -> Iterator[Batch]:
        """Batches up to the first with a file that DALI cannot decode. Such files are left to PIL from then on, which
        reads them or says what is wrong: the next stream goes on with that batch.
        """
        source = Source(self._samples, positions, self._threads, self._prefetch)
        try:
            pipeline = self._build(source)
            while True:
                try:
                    weak, strong = pipeline.run(self._stream())
                except StopIteration:
                    assert source.failure is not None
                    raise source.failure from None
                except RuntimeError:
                    if not self._leave_to_pil(source):
                        raise
                    return
                yield self._batch(source.pending.popleft(), weak, strong)
        finally:
            source.close()

    def _build(self, source: Source) -> Any:
        config, gpu = self._samples.config, self._device.type == "cuda"
        pipeline = pipeline_def(
            batch_size=self._positions.length,
            num_threads=self._threads,
            device_id=_index(self._device) if gpu else None,
            prefetch_queue_depth=self._prefetch,
            exec_dynamic=True,  # its outputs are handed over, not reused
            enable_conditionals=True,
        )(_views)(source, config, gpu)
        pipeline.build()
        return pipeline

    def _stream(self) -> Any:
        """The CUDA stream on which the batch will be used."""
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def _batch(self, samples: list[Sample], weak: Any, strong: Any) -> Batch:
        self._notes.say([problem for sample in samples for problem in sample.problems])
        truths = [sample.truth for sample in samples if sample.truth is not None]
        size = self._samples.config.crop_size
        return Batch(
            weak=torch.from_dlpack(weak.as_tensor()),
            strong=torch.from_dlpack(strong.as_tensor()),
            labels=torch.stack([sample.labels for sample in samples]).to(self._device),
            valid=_inside([sample.parameters.box for sample in samples], size, self._device),
            ids=[sample.id for sample in samples],
            truth=torch.stack(truths).to(self._device) if truths else None,
        )

    def _leave_to_pil(self, source: Source) -> bool:
        """After an error of DALI: whether there are files, among those under way, that it cannot decode."""
        under_way = [sample for batch in source.pending for sample in batch]
        found = {sample.index for sample in under_way if not _decodes(sample, self._device)}
        self._samples.by_pil.update(found)
        return bool(found)


def check_device(device: torch.device) -> None:
    """RuntimeError where DALI cannot work on `device`."""
    gpu = device.type == "cuda"

    def graph() -> Any:
        number = types.Constant([0], device="cpu")
        return number.gpu() if gpu else number

    pipeline = pipeline_def(batch_size=1, num_threads=1, device_id=_index(device) if gpu else None)(graph)()
    pipeline.run()


def _views(source: Source, config: AugmentConfig, gpu: bool) -> tuple[Any, Any]:
    """The graph: (weak, strong)."""
    encoded, start, end, size, blurred, row, column, *colour, position = fn.external_source(
        source=source, num_outputs=INPUTS, batch=True
    )
    weak = blur(cut(decode(encoded, gpu), start, end, size), blurred, row, column)
    strong = apply_colour(weak, *colour)
    return tuple(to_crop(view, position, config.crop_size, config.mean, config.std) for view in (weak, strong))


def _decodes(sample: Sample, device: torch.device) -> bool:
    """Whether DALI decodes the sample's file."""
    gpu = device.type == "cuda"

    def graph() -> Any:
        return decode(fn.external_source(source=lambda: [sample.encoded], batch=True), gpu)

    index = _index(device) if gpu else None
    pipeline = pipeline_def(batch_size=1, num_threads=1, device_id=index, prefetch_queue_depth=1)(graph)()
    pipeline.build()
    try:
        (image,) = pipeline.run()
    except RuntimeError:
        return False
    return tuple(image.shape()[0]) == (*sample.size, 3)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _inside(boxes: list[Box], size: int, device: torch.device) -> Tensor:
    """(B, size, size) bool on `device`: True inside each box."""
    top, left, height, width = torch.tensor(boxes, device=device)[:, :, None].unbind(1)
    place = torch.arange(size, device=device)
    rows, columns = ((place >= first) & (place < first + length) for first, length in ((top, height), (left, width)))
    return rows[:, :, None] & columns[:, None, :]
