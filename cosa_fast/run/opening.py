"""What a run says before its first iteration: one short block, so that a wrong folder, network or recipe is seen before
hours are spent on it."""

import textwrap
from collections.abc import Sequence

import torch

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.device import compute_type
from cosa_fast.engine.base import EngineBase, TrainingEngine
from cosa_fast.engine.compiling import compiles
from cosa_fast.errors import counted
from cosa_fast.kernels.launch.runtime import use_triton
from cosa_fast.run.folder import RunFolder

COLUMNS = 100
INDENT = 10
SHOWN_CLASSES = 8


def opening(
    engine: TrainingEngine,
    training_set: ImageDataset,
    validation_set: ImageDataset,
    pipeline: str,
    reason: str,
    folder: RunFolder,
) -> str:
    """The block, of lines of at most 100 columns (a path stays whole), and below it what may be a slip in the schedule.
    pipeline: the chosen one, and the reason."""
    config = engine.config
    facts = {
        "data": _data(config, training_set, validation_set),
        "network": _network(engine),
        "device": _device(engine),
        "pipeline": f"{pipeline} ({reason}), {_workers(config, pipeline)}",
        "recipe": _recipe(config, len(training_set)),
        "folder": f"{folder.path} (run.output/run.name)",
    }
    lines = [*facts.items(), *(("note:", text) for text in _notes(config))]
    return "\n".join(
        textwrap.fill(
            text,
            COLUMNS,
            initial_indent=name.ljust(INDENT),
            subsequent_indent=" " * INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in lines
    )


def _notes(config: Config) -> list[str]:
    """Of a schedule, what may be meant and often is not."""
    optim, every = config.optim, config.eval.every
    notes = {
        f"optim.warmup = {optim.warmup} is not shorter than the run: the learning rate stays below optim.lr": (
            optim.warmup >= optim.iterations
        ),
        "optim.cotrain_after = optim.iterations: only the classifier learns, the segmentation stays as it is": (
            optim.cotrain_after == optim.iterations and not config.model.standalone
        ),
        f"eval.every = {every} is longer than the run: its one evaluation is that after the last iteration": (
            every > optim.iterations
        ),
    }
    return [text for text, holds in notes.items() if holds]


def _data(config: Config, training_set: ImageDataset, validation_set: ImageDataset) -> str:
    data, limit = config.data, config.eval.limit
    evaluated = min(len(validation_set), limit or len(validation_set))
    of = f" of {len(validation_set)} (eval.limit)" if evaluated < len(validation_set) else ""
    masks = "with masks" if validation_set.has_masks else "no masks: no mIoU"
    learned = f"labels from {training_set.label_source}"
    if config.model.standalone:
        learned = f"pseudo-labels from {data.pseudo_labels}"
    return (
        f"{data.format} {data.root}: {counted(len(training_set), 'image')} to train on ({learned}), "
        f"{evaluated}{of} to evaluate ({masks}); "
        f"{counted(len(training_set.classes), 'class', 'es')}: {_first(training_set.classes)}"
    )


def _first(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_CLASSES
    return ", ".join(names[:SHOWN_CLASSES]) + (f", and {more} more" if more > 0 else "")


def _network(engine: TrainingEngine) -> str:
    """Architecture, size, and where the weights are from: a resumed run's are from its checkpoint."""
    model, network = engine.config.model, engine.learner
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    origin = f"weights of the checkpoint of iteration {engine.iteration}" if engine.iteration else network.origin
    name = f"{model.architecture} around {model.backbone}" if model.standalone else model.backbone
    return f"{name}, {millions:.1f} M parameters; {origin}"


def _device(engine: TrainingEngine) -> str:
    config, device, ranks = engine.config.run, engine.device, engine.ranks
    if device.type == "cuda":
        parts = [torch.cuda.get_device_name(device)]
    else:
        parts = [f"cpu ({counted(torch.get_num_threads(), 'thread')})"]
    if ranks.size > 1:
        parts.append(f"one of {ranks.size} processes")
    parts.append({torch.bfloat16: "bf16", torch.float32: "fp32"}[compute_type(config.precision, device)])
    if not isinstance(engine, EngineBase):
        return ", ".join(parts)
    parts.append(f"{config.engine} engine")
    on_device = torch.empty(0, device=device)
    parts.append("Triton kernels" if use_triton(config.backend, on_device) else "plain PyTorch operators")
    if config.engine == "fused":
        parts += ["compiled blocks"] * compiles(engine.config, device)
    if device.type == "cuda":
        parts.append("CUDA graphs" if engine.not_captured is None else f"no CUDA graphs ({engine.not_captured})")
    return ", ".join(parts + _attention(engine))


def _attention(engine: EngineBase) -> list[str]:
    """The kernels of both networks; nothing for networks without attention."""
    on, an = engine.attentions
    if on is None or an is None:
        return []
    return [f"{on} attention" if on == an else f"attention {on} (ON) and {an} (AN)"]


def _workers(config: Config, pipeline: str) -> str:
    count = config.data.workers
    if pipeline == "dali":
        return counted(max(1, count), "thread")
    return counted(count, "worker process", "es") if count else "no worker processes"


def _recipe(config: Config, images: int) -> str:
    optim, teacher, threshold = config.optim, config.teacher, config.threshold
    passes = optim.iterations * optim.batch_size / images
    scales = ", ".join(f"{scale:g}" for scale in teacher.scales)
    thresholds = {
        "dynamic": "dynamic thresholds",
        "fixed": f"thresholds {threshold.value:g} and {threshold.value_aux:g}",
        "band": f"thresholds {threshold.band[0]:g} to {threshold.band[1]:g}",
    }[threshold.mode]
    schedule = (
        f"{counted(optim.iterations, 'iteration')} of {counted(optim.batch_size, 'image')} ({passes:.3g} passes), crop "
        f"{config.data.crop_size}"
    )
    rate = f"lr {optim.lr:g} (heads ×{optim.head_multiplier:g}), warm-up {optim.warmup}"
    once = config.eval.every >= optim.iterations
    evaluations = "an evaluation at the end" if once else f"an evaluation every {config.eval.every}"
    rest = f"{evaluations}; seed {config.run.seed}"
    if config.model.standalone:
        return f"{schedule}; {rate}; cross entropy with the pseudo-labels; {rest}"
    cotraining = f"co-training after {optim.cotrain_after}"
    if optim.cotrain_after == optim.iterations:
        cotraining = "classification only"
    return (
        f"{schedule}, {cotraining}; {rate}; AN: momentum {teacher.momentum:g}, scales "
        f"{scales}{' with mirror' * teacher.flip}; {thresholds}; {rest}"
    )
