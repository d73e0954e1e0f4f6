"""A notebook's four verbs: load_config, train, evaluate, segment.

    from cosa_fast import api

    config = api.load_config("demo.yaml", ["optim.iterations=100", "optim.cotrain_after=50"])
    summary = api.train(config, overwrite=True)
    api.evaluate(summary.folder.best)["an"].summary()["seg_label_free"]
    masks = api.segment(summary.folder.best, ["cat.jpg", "dog.jpg"])

What a caller can get wrong raises cosa_fast.errors.UserError, whose message names the remedy.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cosa_fast.cli import NETWORKS
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.images import read_image
from cosa_fast.errors import UserError
from cosa_fast.evaluation.evaluator import AnyResult
from cosa_fast.evaluation.label_only import LabelResult
from cosa_fast.evaluation.networks import load_networks
from cosa_fast.evaluation.prediction import MAX_SIDE
from cosa_fast.evaluation.result import EvalResult
from cosa_fast.pictures.predictions import Predictor
from cosa_fast.report.page import write
from cosa_fast.run.evaluating import configure, evaluate_networks
from cosa_fast.run.training import Summary
from cosa_fast.run.training import train as run_training

__all__ = ["Config", "EvalResult", "LabelResult", "Summary", "evaluate", "load_config", "segment", "train"]


def train(
    config: Config, *, resume: str | Path | None = None, overwrite: bool = False, profile: int | None = None
) -> Summary:
    """Train as configured, and leave a run's folder with report.html; progress as in the command line.

    Arguments, errors and what is saved when: as cosa_fast.run.training.train says.

        summary = train(load_config("demo.yaml"), overwrite=True)
        print(summary.results["an"].table())
        summary.folder.report  # to open in a browser
    """
    if not isinstance(config, Config):
        raise UserError(f"{config}: give train what load_config returns")
    resume = None if resume is None else str(resume)
    return run_training(config, resume=resume, overwrite=overwrite, profile=profile, report=write)


def evaluate(
    checkpoint: str | Path,
    overrides: str | Sequence[str] = (),
    *,
    networks: str | Sequence[str] = ("on", "an"),
    limit: int | None = None,
) -> dict[str, AnyResult]:
    """What a checkpoint's networks score on the validation split: {"on": ..., "an": ...}; a LabelResult
    where that has no masks. `images`, `set_size`, `extent` say of how many images, `bias` whether the checkpoint was
    chosen by its figures on such images; the table says both.

    overrides: "key=value" for what an evaluation uses of the checkpoint's configuration. networks: which of the
    two. limit: only so many images, evenly spread over the set.
    Raises UserError for a checkpoint or data set that cannot be read or does not fit.

        results = evaluate("runs/voc/checkpoints/best.pt", ["data.root=VOC2012", "eval.scales=[1.0]"])
        print(results["an"].table())
        results["an"].summary()["seg_label_free"]  # mIoU in percent
    """
    overrides, chosen = _several(overrides), [_network(name) for name in _several(networks)]
    if not chosen:
        raise UserError("networks=[]: name 'on', 'an' or both")
    loaded = load_networks(checkpoint, overrides=overrides)
    return evaluate_networks(loaded, configure(loaded, overrides, str(checkpoint)), chosen, limit=limit)


def segment(
    checkpoint: str | Path,
    images: str | Path | Image.Image | Iterable[str | Path | Image.Image],
    *,
    network: str = "an",
    labels: str | Sequence[str] | None = None,
    scales: Sequence[float] | None = None,
    max_side: int = MAX_SIDE,
) -> list[np.ndarray]:
    """The segmentation of each image, a file or a PIL image: (H, W) uint8 (int16 for more than 254 classes), 0 for
    background, c + 1 for class c.

    network: "on" or "an". labels: the class names that may appear besides background (None: all). scales: those of the
    evaluation if None. max_side: longer images are shrunk to it for the network; their results keep their size.
    Raises UserError for a checkpoint or image that cannot be read, and for an unknown class name.

        masks = segment("runs/voc/checkpoints/best.pt", ["cat.jpg", Image.open("dog.jpg")])
        masks[0].shape  # that of cat.jpg, upright
        (masks[0] == 8).mean()  # the cat's share of the image: cat is class 7 of VOC, counted from 0
    """
    if scales is not None and not (scales and all(scale > 0 for scale in scales)):
        raise UserError(f"scales={list(scales)}: give positive numbers, or None")
    if max_side < 1:
        raise UserError(f"max_side={max_side}: give a number of pixels")
    labels = None if labels is None else _several(labels)
    network = _network(network)
    predictor = Predictor(load_networks(checkpoint), network=network, labels=labels, scales=scales, max_side=max_side)
    return [predictor.predict(_opened(image)).classes for image in _several(images)]


def _several(given: Any) -> list[Any]:
    """A single text, path or image is a list of one."""
    return [given] if isinstance(given, str | Path | Image.Image) else list(given)


def _network(name: str) -> str:
    if name not in NETWORKS:
        raise UserError(f"network {name!r}: there are 'on' and 'an'")
    return NETWORKS[name]


def _opened(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, str | Path):
        raise UserError(f"segment takes files and PIL images, not {type(image).__name__}; PIL has Image.fromarray")
    return read_image(Path(image))
