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

import numpy as np
from PIL import Image

from cosa_fast.config.parsing import load_config
from cosa_fast.data_pipeline.datasets.images import read_image
from cosa_fast.evaluation.evaluator import AnyResult
from cosa_fast.evaluation.label_only import LabelResult
from cosa_fast.evaluation.networks import load_networks
from cosa_fast.evaluation.prediction import MAX_SIDE, Segmenter
from cosa_fast.evaluation.result import EvalResult
from cosa_fast.run.evaluating import configure, evaluate_networks
from cosa_fast.run.training import Summary, train

__all__ = ["EvalResult", "LabelResult", "Summary", "evaluate", "load_config", "segment", "train"]


def evaluate(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    *,
    networks: Sequence[str] = ("on", "an"),
    limit: int | None = None,
) -> dict[str, AnyResult]:
    """What a checkpoint's networks score on the validation split: {"on": ..., "an": ...}; a LabelResult
    where that has no masks.

    overrides: "key=value" for the sections data, teacher, eval and run of the checkpoint's configuration. networks:
    which of the two. limit: only so many images, evenly spread over the set.
    Raises UserError for a checkpoint or data set that cannot be read or does not fit.

        results = evaluate("runs/voc/checkpoints/best.pt", ["data.root=VOC2012", "eval.scales=[1.0]"])
        print(results["an"].table())
        results["an"].summary()["seg_label_free"]  # mIoU in percent
    """
    loaded = load_networks(checkpoint, overrides=overrides)
    return evaluate_networks(loaded, configure(loaded, overrides, str(checkpoint)), networks, limit=limit)


def segment(
    checkpoint: str | Path,
    images: Iterable[str | Path | Image.Image],
    *,
    network: str = "an",
    labels: Sequence[str] | None = None,
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
    segmenter = Segmenter(load_networks(checkpoint), network=network, labels=labels, scales=scales, max_side=max_side)
    return [segmenter.segment(_opened(image)) for image in images]


def _opened(image: str | Path | Image.Image) -> Image.Image:
    return image.convert("RGB") if isinstance(image, Image.Image) else read_image(Path(image))
