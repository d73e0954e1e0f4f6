"""Networks and data sets with known answers, for the tests of evaluation and of what is built on it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cosa_fast.config.parsing import config_to_dict
from cosa_fast.config.schema import Config, DataConfig, EvalConfig, ModelConfig, TeacherConfig
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.evaluation.evaluator import Evaluator
from cosa_fast.evaluation.result import EvalResult
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet, Outputs
from cosa_fast.run import checkpoint

CLASSES = ("cat", "dog", "horse")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
COLOURS = np.array([(10, 10, 10), (250, 10, 10), (10, 250, 10), (10, 10, 250)], dtype=np.uint8)
SIZES = ((40, 57), (33, 24), (64, 48))


def make_dataset(root: Path, masks: list[np.ndarray], classes: tuple[str, ...] = CLASSES) -> ImageDataset:
    """Image files whose colour is the class of the mask, so that a network can be right or wrong at will."""
    root.mkdir(parents=True, exist_ok=True)
    files, mask_files = [], []
    for index, mask in enumerate(masks):
        files.append(root / f"{index}.png")
        mask_files.append(root / f"{index}_mask.png")
        Image.fromarray(COLOURS[np.where(mask == 255, 0, mask)]).save(files[-1])
        Image.fromarray(mask).save(mask_files[-1])
    return ImageDataset(classes, [str(index) for index in range(len(masks))], files, masks=mask_files)


def block_masks() -> list[np.ndarray]:
    """A cat; a dog and a horse with an ignored border; nothing but background."""
    first, second, third = (np.zeros(size, np.uint8) for size in SIZES)
    first[8:30, 10:40] = 1
    second[:16] = 2
    second[20:, 12:] = 3
    second[:2] = 255
    return [first, second, third]


class ColourNet(nn.Module):
    """A network of stride 8 that reads the class from the colour of a cell: real Outputs, known answers."""

    stride = 8
    is_packed = False

    def __init__(self, aux: bool = True, confuse: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.aux = aux
        self.calls: list[tuple[tuple[int, ...], bool]] = []
        targets = torch.tensor(COLOURS / 255.0, dtype=torch.float32)
        if confuse is not None:
            targets[list(confuse)] = targets[list(reversed(confuse))]
        self.register_buffer("targets", (targets - 0.5) / 0.25)

    def forward(self, images: Tensor, seg: bool = True) -> Outputs:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append((tuple(images.shape), seg))
        cells = F.avg_pool2d(images, self.stride)
        scores = -(cells[:, None] - self.targets[None, :, :, None, None]).square().sum(2)
        cam = scores[:, 1:] - scores[:, :1]
        return Outputs(cam.amax((2, 3)), cam, scores if seg else None, None, 0.5 * cam if self.aux else None)


def evaluate(network: nn.Module, dataset: ImageDataset, **options: Any) -> EvalResult:
    """The network's result. Options: `eval`, `teacher`, `precision`, `crop_size`, and what Evaluator.evaluate takes."""
    config = Config(
        data=DataConfig(mean=MEAN, std=STD, crop_size=options.pop("crop_size", 448)),
        eval=options.pop("eval", EvalConfig(scales=(1.0,), cam_step=0.1)),
        teacher=options.pop("teacher", TeacherConfig(scales=(1.0,))),
    )
    config = replace(config, run=replace(config.run, precision=options.pop("precision", "fp32")))
    evaluator = Evaluator(config, CLASSES, "cpu")
    return evaluator.evaluate(network, dataset, **({"thresholds": (0.3, 0.5)} | options))  # type: ignore[arg-type]


TINY_MODEL = ModelConfig(backbone="test_vit", weights="none", aux_layer=-2, decoder_width=16)


def random_network(seed: int = 0) -> CoSANet:
    """A tiny network with random heads that disagree between pixels and classes."""
    torch.manual_seed(seed)
    network = build_model(TINY_MODEL, len(CLASSES))
    with torch.no_grad():
        for parameter in network.head_parameters():
            parameter.normal_(std=0.3)
    return network


def save_networks(
    path: Path, on: CoSANet, an: CoSANet, config: Config, *, iteration: int = 1, thresholds: Sequence[float] = ()
) -> Path:
    """A checkpoint with what evaluation and prediction read of one."""
    state = {
        "config": config_to_dict(config),
        "classes": list(CLASSES),
        "iteration": iteration,
        "student": on.state_dict(),
        "teacher": an.state_dict(),
        "thresholds": [{"value": torch.tensor(value)} for value in thresholds],
    }
    checkpoint.save(path, state)
    return path


def write_voc(root: Path, masks: list[np.ndarray]) -> Path:
    """The set of `make_dataset` in the layout of VOC, JPEG images, with the splits val (all) and half (the second)."""
    images, truths, lists = (root / name for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"))
    for folder in (images, truths, lists):
        folder.mkdir(parents=True)
    for index, mask in enumerate(masks):
        Image.fromarray(COLOURS[np.where(mask == 255, 0, mask)]).save(images / f"{index}.jpg")
        Image.fromarray(mask).save(truths / f"{index}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (lists / "val.txt").write_text("".join(f"{index}\n" for index in range(len(masks))))
    (lists / "half.txt").write_text("1\n")
    return root


def picture(path: Path, width: int = 100, height: int = 70, seed: int = 0) -> Path:
    """An image of random blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST).save(path)
    return path
