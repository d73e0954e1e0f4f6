"""From a configuration to data sets, a pipeline and its stream of batches."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from cosa_fast.config.schema import Config, DataConfig
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.labels import Say
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.pseudo_labels import PseudoLabelled
from cosa_fast.data_pipeline.datasets.subset import hold_out, masked_part
from cosa_fast.data_pipeline.datasets.synthetic import generate_missing
from cosa_fast.data_pipeline.evaluation_stream import Loading
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.errors import UserError, counted, first_line, hint

Pipeline = Literal["dali", "torch"]


def open_datasets(config: Config, say: Say | None = None) -> tuple[ImageDataset, ImageDataset]:
    """The training and the validation set, of the same classes. Without data.val_split the latter is a part of the
    training split that is held out. say: is told how the labels were understood, and what is evaluated. The images of
    format "synthetic" are generated unless they are there.
    """
    data, say = config.data, say or (lambda text: None)
    if data.format == "synthetic":
        _generate(data.root)
    whole = open_dataset(
        data.format, data.root, data.train_split, labels=data.labels, classes=data.classes, pack=data.pack, say=say
    )
    classes = whole.classes
    training_set: ImageDataset = whole
    if data.val_split:
        validation_set = _validation(config, classes, say)
    else:
        training_set, validation_set = hold_out(whole, say=say)
    validation_set = _evaluated(config, validation_set, say)
    if config.model.standalone or data.pseudo_labels:
        training_set = _pseudo_labelled(config, training_set, say)
    elif config.loss.guidance == "truth":
        if not training_set.has_masks:
            raise UserError(f"loss.guidance=truth needs masks of {data.train_split}, and {data.root} has none of it")
        training_set.check_masks(threads=data.workers)
    for key, names in (("eval.classes", config.eval.classes or ()), ("eval.coexistence", config.eval.coexistence)):
        for name in names:
            if name not in classes:
                nearest = hint(name, classes)
                raise UserError(f"{key}: {name!r} is not a class of {data.root}{nearest}; it has {', '.join(classes)}")
    return training_set, validation_set


def _generate(root: str) -> None:
    """Generated images in data.root; not in that of VOC, where they would later be taken for VOC."""
    if root == DataConfig.root:
        raise UserError(
            f"data.root = {root} is that of VOC; name a folder to generate images into: data.root=data/demo"
        )
    generate_missing(root)


def _pseudo_labelled(config: Config, dataset: ImageDataset, say: Say) -> ImageDataset:
    """The training images with the masks of data.pseudo_labels, all of them checked, which is said."""
    place, architecture = config.data.pseudo_labels, config.model.architecture
    if not config.model.standalone:
        raise UserError(
            f"data.pseudo_labels = {place}: CoSA makes its own; set model.architecture to DeepLabV3Plus, Segformer or "
            "UPerNet, or data.pseudo_labels to null"
        )
    if not place:
        raise UserError(
            f"model.architecture = {architecture} learns from pseudo-labels; give data.pseudo_labels=FOLDER, as "
            "predict --what cpl -o FOLDER writes them"
        )
    labelled = PseudoLabelled(dataset, Path(place).expanduser(), config.data.train_split)
    for note in labelled.check_masks(threads=config.data.workers):
        say(f"{place}: {note}")
    say(f"{config.data.train_split}: pseudo-labels of {counted(len(labelled), 'image')} from {place}")
    return labelled


def open_validation_set(config: Config, say: Say | None = None) -> ImageDataset:
    """What `open_datasets` evaluates, opened without data.pack."""
    data, say = config.data, say or (lambda text: None)
    if data.val_split:
        return _evaluated(config, _validation(config, data.classes, say), say)
    whole = open_dataset(data.format, data.root, data.train_split, labels=data.labels, classes=data.classes)
    return _evaluated(config, hold_out(whole)[1], say)


def _validation(config: Config, classes: Sequence[str] | None, say: Say) -> ImageDataset:
    """data.val_split; its images need labels only where there are no masks."""
    data = config.data
    where = (data.format, data.root, str(data.val_split))
    dataset = open_dataset(*where, labels=data.labels, classes=classes, need_labels=False)
    for note in dataset.notes:
        say(f"{data.val_split}: {note}")
    if dataset.has_masks or dataset.masks_absent:
        return dataset
    return open_dataset(*where, labels=data.labels, classes=classes)


def _evaluated(config: Config, dataset: ImageDataset, say: Say) -> ImageDataset:
    """The images of the validation set that can be evaluated, their masks checked, which is said. UserError for masks
    that cannot be used, that cannot be the truth, or that are there but belong to no image.
    """
    part = masked_part(dataset)
    which = config.data.val_split or f"held out of the training ({counted(len(dataset), 'image')}, by hash of the name)"
    if not part.has_masks and dataset.masks_absent:
        raise UserError(dataset.masks_absent)
    for note in part.check_masks(threads=config.data.workers):
        say(f"{which}: {note}")
    if not part.has_masks:
        say(
            f"{which}: no masks, so no mIoU; image AP, agreement of CAM and segmentation, and pictures of "
            f"{counted(len(part), 'image')}; the best checkpoint is the last"
        )
    elif len(part) < len(dataset):
        say(f"{which}: masks of {len(part)} of {len(dataset)} images; only these are evaluated")
    else:
        say(f"{which}: {counted(len(part), 'image')} with masks")
    return part


def choose_pipeline(config: Config, device: torch.device, before: Pipeline | None = None) -> tuple[Pipeline, str]:
    """(pipeline, reason) that data.pipeline means on `device`; `before`: the one that a resumed run has used so far,
    which auto keeps. UserError where DALI is asked for and does not work.
    """
    wanted = config.data.pipeline
    if wanted == "torch" or (wanted == "auto" and before == "torch"):
        return "torch", "data.pipeline = torch" if wanted == "torch" else "as the run began"
    problem = dali_problem(device)
    if problem is None:
        return "dali", f"it works on {device.type}"
    if wanted == "dali":
        raise UserError(f"data.pipeline = dali, but {problem}; use data.pipeline=torch or auto")
    return "torch", problem


def dali_problem(device: torch.device) -> str | None:
    """Why DALI does not work on `device`; None where it does."""
    try:
        from cosa_fast.data_pipeline.dali.feed import check_device
    except (ImportError, OSError) as error:
        install = 'pip install -c constraints.txt -e ".[dali]"'
        return f"the package nvidia-dali-cuda130 cannot be imported ({first_line(error)}); install it: {install}"
    try:
        check_device(device)
    except RuntimeError as error:
        return f"DALI does not work on {device} ({first_line(error)})"
    return None


def loading(config: Config, pipeline: Pipeline) -> Loading:
    """How an evaluation reads its images."""
    return Loading(pipeline, max(1, config.data.workers), config.data.prefetch)


def open_pipeline(
    config: Config,
    dataset: ImageDataset,
    device: torch.device,
    pipeline: Pipeline,
    *,
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterable[Batch]:
    """The stream of training batches from sample position `start` on: the rank-th of `ranks` parts of each."""
    data = config.data
    with_truth = config.model.standalone or config.loss.guidance == "truth"
    common = (dataset, data, config.optim.batch_size, config.run.seed)
    if pipeline == "torch":
        return TorchPipeline(
            *common,
            start=start,
            rank=rank,
            ranks=ranks,
            workers=data.workers,
            prefetch=data.prefetch,
            pinned=device.type == "cuda",
            with_truth=with_truth,
            unreadable=data.unreadable,
        )
    from cosa_fast.data_pipeline.dali.pipeline import DaliPipeline

    return DaliPipeline(
        *common,
        device=device,
        start=start,
        rank=rank,
        ranks=ranks,
        threads=max(1, data.workers),
        prefetch=data.prefetch,
        with_truth=with_truth,
        unreadable=data.unreadable,
    )
