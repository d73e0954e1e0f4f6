"""The steps that are compared: the method as it is usually written, ours, and ours with one optimisation off; and the
batches that they are fed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, get_args

import torch

from bench.operators.scene import COCO, DEMO, VOC
from bench.steps.baseline import Baseline, BaselineLosses
from bench.timing import wait_for
from cosa_fast.config.parsing import config_from_dict, config_to_dict
from cosa_fast.config.schema import Attention, Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.engine.base import EngineBase
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.plain import Engine
from cosa_fast.errors import UserError
from cosa_fast.run.data import choose_pipeline, open_pipeline

# What each line of the speed ablation changes. Plain kernels and the plain engine also run outside CUDA graphs.
ON_CPU = {
    "ours, plain engine": ["run.engine=plain"],
    "ours, packed attention": ["teacher.attention=packed"],
}
ABLATIONS = {
    "ours, eager blocks": ["run.compile=off"],
    "ours, no CUDA graph": ["run.capture=off"],
    "ours, plain kernels": ["run.backend=reference"],
    "ours, fp32": ["run.precision=fp32"],
    **ON_CPU,
    "ours, varlen attention": ["teacher.attention=varlen"],
}
KINDS = tuple(kind for kind in get_args(Attention) if kind != "auto")
BACKBONES = {
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
}
CLASSES = {"voc": VOC, "coco": COCO, "synthetic": DEMO}

Step = Callable[[Batch], Any]


class OurStep:
    """The step of one of our engines."""

    def __init__(self, engine: EngineBase) -> None:
        self._engine = engine

    def __call__(self, batch: Batch) -> Any:
        return self._engine.step(batch)

    @property
    def not_captured(self) -> str | None:
        """Why steps that were to be captured are not."""
        return self._engine.not_captured


def class_count(config: Config, given: int | None) -> int:
    """Classes of synthetic batches: as given, as configured, or those of the data set."""
    if given is not None:
        return given
    if config.data.classes is not None:
        return len(config.data.classes)
    if config.data.format not in CLASSES:
        raise UserError(f"data.format = {config.data.format}: how many classes it has is unknown; give --classes N")
    return CLASSES[config.data.format]


def changed(config: Config, overrides: list[str]) -> Config:
    """The configuration with key=value overrides."""
    return config_from_dict(config_to_dict(config), overrides, where="bench")


def providers(config: Config, num_classes: int, device: torch.device, chosen: str) -> dict[str, Callable[[], Step]]:
    """Makers of steps by name, the most wanted first; `chosen`: "all", "main" (no ablation), "ablations" (without the
    fp32 baseline), "ours", "quick" (ours, on a GPU also without compiled blocks, which is timed first as it does not
    wait for a compiler) or "baseline".

    UserError where the baseline does not know what is configured.
    """

    def ours(overrides: list[str]) -> Callable[[], Step]:
        return partial(our_step, config, overrides, num_classes, device)

    def baseline(fast: bool) -> Callable[[], Step]:
        return lambda: Baseline(config, num_classes, device, bf16=fast, compiled=fast).step

    found = {"ours": ours([])}
    if chosen == "ours":
        return found
    if chosen == "quick":
        eager = "ours, eager blocks"
        return {eager: ours(ABLATIONS[eager]), **found} if device.type == "cuda" else found
    _require_same_steps(config)
    if chosen == "baseline":
        return {"baseline": baseline(False)}
    if chosen != "ablations":
        found["baseline"] = baseline(False)
    if chosen != "main":
        wanted = ABLATIONS if device.type == "cuda" else ON_CPU
        found |= {name: ours(overrides) for name, overrides in wanted.items()}
        if device.type == "cuda":
            found["baseline, bf16 + compile"] = baseline(True)
    return found


def our_step(config: Config, overrides: list[str], num_classes: int, device: torch.device) -> Step:
    """The step of our engine for a configuration with overrides."""
    own = changed(config, overrides)
    return OurStep((Engine if own.run.engine == "plain" else FusedEngine)(own, num_classes, device))


def attention_providers(
    config: Config, num_classes: int, device: torch.device, kinds: Sequence[str]
) -> dict[str, Callable[[], Step]]:
    """Makers of steps: ours as configured, and with one network attending by each of these kernels; AN first, which
    attends most. (ON sees one size, so that "packed" is "sdpa" to it.)"""
    makers: dict[str, Callable[[], Step]] = {"ours": partial(our_step, config, [], num_classes, device)}
    for section, network in (("teacher", "AN"), ("model", "ON")):
        for kind in kinds:
            if (network, kind) != ("ON", "packed"):
                overrides = [f"{section}.attention={kind}"]
                makers[f"{network} by {kind}"] = partial(our_step, config, overrides, num_classes, device)
    return makers


def _require_same_steps(config: Config) -> None:
    """UserError where the baseline does not compute what is configured."""
    BaselineLosses(config)
    if config.optim.accumulate > 1:
        raise UserError("optim.accumulate: the baseline takes the batch in one pass; or compare with --providers ours")


class Feed(Protocol):
    """Batches for a step; `waited`: seconds that they let the step wait so far."""

    @property
    def waited(self) -> float: ...

    def next(self) -> Batch: ...


class OneBatch:
    """The same batch every time."""

    waited = 0.0

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def next(self) -> Batch:
        return self._batch


class RealBatches:
    """Fresh batches of the configured data, made by its pipeline while the step computes. What they let it wait is the
    time of the host for a batch, and on a GPU that of the device for its copy."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._host = 0.0
        self._copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._device = device
        data = config.data
        dataset = open_dataset(data.format, data.root, data.train_split, labels=data.labels, classes=data.classes)
        self.classes = len(dataset.classes)
        stream = open_pipeline(config, dataset, device, choose_pipeline(config, device)[0])
        self._batches = iter(stream)

    @property
    def waited(self) -> float:
        """Waits for the device, too."""
        wait_for(self._device)
        self._host += sum(before.elapsed_time(after) for before, after in self._copies) / 1000
        self._copies = []
        return self._host

    def next(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._batches)
        if self._device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            batch = batch.to(self._device)
            after.record()
            self._copies.append((before, after))
        self._host += time.perf_counter() - start
        return batch


def synthetic_batch(config: Config, num_classes: int, device: torch.device) -> Batch:
    """A batch of smooth noise: one to three classes per image, a padded border in some."""
    generator = torch.Generator().manual_seed(config.run.seed)
    size, count = config.data.crop_size, config.optim.batch_size
    coarse = torch.randn(2, count, 3, size // 16, size // 16, generator=generator)
    weak, strong = (torch.nn.functional.interpolate(view, size=(size, size), mode="bicubic") for view in coarse)
    labels = torch.zeros(count, num_classes)
    for row in labels:
        present = 1 + int(torch.randint(3, (), generator=generator))
        row[torch.randperm(num_classes, generator=generator)[:present]] = 1
    valid = torch.ones(count, size, size, dtype=torch.bool)
    valid[::2, : size // 8] = False
    return Batch(weak, strong, labels, valid, [str(index) for index in range(count)]).to(device)
