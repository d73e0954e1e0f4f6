"""A tiny network on a tiny generated data set: small enough for real steps in every test."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosa_fast.config.parsing import config_from_dict
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.synthetic import generate
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.engine.plain import Engine

CLASSES = 5

TINY: dict[str, Any] = {
    "data": {
        "format": "voc",
        "train_split": "train",
        "val_split": "val",
        "crop_size": 64,
        "pipeline": "torch",
        "workers": 0,
    },
    "model": {
        "backbone": "vit_tiny_patch16_224",
        "weights": "none",
        "arguments": {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2},
        "aux_layer": -2,
        "decoder_width": 16,
        "decoder_dilation": 2,
    },
    "teacher": {"momentum": 0.9},
    "threshold": {"queue_length": 4, "bins": 64},
    "optim": {
        "iterations": 6,
        "batch_size": 2,
        "cotrain_after": 3,
        "lr": 1e-3,
        "warmup": 2,
        "warmup_lr": 1e-4,
    },
    "eval": {"every": 100, "scales": [1.0], "flip": False, "cam_step": 0.25},
    "run": {"name": "tiny", "device": "cpu", "threads": 1, "log_every": 1, "checkpoint_every": 100, "keep": 20},
}
STANDALONE = {"architecture": "DeepLabV3Plus", "backbone": "tu-test_resnet", "weights": "none"}


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and two validation images, to be read only."""
    root = tmp_path_factory.mktemp("data") / "set"
    generate(root, train=8, val=2, size=64, seed=1)
    return root


@pytest.fixture(scope="session")
def tiny_values(data_root: Path) -> dict[str, Any]:
    """The tiny configuration as a plain dictionary."""
    return {**TINY, "data": {**TINY["data"], "root": str(data_root)}}


MakeConfig = Callable[..., Config]


@pytest.fixture
def make_config(tiny_values: dict[str, Any], tmp_path: Path) -> MakeConfig:
    """make_config("key=value", ...): the tiny configuration with overrides, writing below this test's folder."""

    def make(*overrides: str) -> Config:
        return config_from_dict(tiny_values, [f"run.output={tmp_path / 'runs'}", *overrides], where="tiny")

    return make


@pytest.fixture
def cpl(data_root: Path, tmp_path: Path) -> Path:
    """A folder as `predict --what cpl` leaves it; its pseudo-labels are the masks of the training images."""
    (tmp_path / "cpl/masks").mkdir(parents=True)
    for path in (data_root / "SegmentationClass").glob("train*.png"):
        shutil.copy(path, tmp_path / "cpl/masks")
    return tmp_path / "cpl"


@pytest.fixture
def make_standalone(tiny_values: dict[str, Any], cpl: Path, tmp_path: Path) -> MakeConfig:
    """make_standalone("key=value", ...): a tiny run of CoSA-MS with overrides, writing below this test's folder."""
    values = {**tiny_values, "model": STANDALONE}
    common = [f"run.output={tmp_path / 'runs'}", f"data.pseudo_labels={cpl}"]
    common += ["optim.cotrain_after=0", "optim.iterations=4"]

    def make(*overrides: str) -> Config:
        return config_from_dict(values, [*common, *overrides], where="tiny")

    return make


@pytest.fixture
def make_engine(make_config: MakeConfig) -> Callable[..., Engine]:
    """make_engine("key=value", ...): an engine that co-trains from its first step, unless overridden."""

    def make(*overrides: str) -> Engine:
        return Engine(make_config("optim.cotrain_after=0", *overrides), CLASSES, torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def batches(tiny_values: dict[str, Any]) -> list[Batch]:
    """The first four batches of the tiny data set, with their masks."""
    config = config_from_dict(tiny_values, where="tiny")
    dataset = open_dataset("voc", config.data.root, "train")
    stream = iter(TorchPipeline(dataset, config.data, config.optim.batch_size, seed=0, with_truth=True))
    return [next(stream) for _ in range(4)]


@pytest.fixture
def first_step(make_engine: Callable[..., Engine], batches: list[Batch]) -> Callable[..., dict[str, Tensor]]:
    """first_step("key=value", ...): the metrics of the first co-training step of a new engine."""

    def run(*overrides: str) -> dict[str, Tensor]:
        return make_engine(*overrides).step(batches[0])

    return run


@dataclass
class Calls:
    """The shapes of the images of every forward pass of a network since it was watched."""

    shapes: list[tuple[int, ...]]


@pytest.fixture
def watch() -> Callable[[torch.nn.Module], Calls]:
    """watch(network): count its forward passes."""

    def attach(network: torch.nn.Module) -> Calls:
        calls = Calls([])
        network.register_forward_pre_hook(lambda _, inputs: calls.shapes.append(tuple(inputs[0].shape)))
        return calls

    return attach


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], bool]:
    """same(a, b): nested dictionaries, lists and tensors are equal, tensors bit for bit."""

    def compare(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(compare(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(compare, a, b))
        return bool(a == b)

    return compare
