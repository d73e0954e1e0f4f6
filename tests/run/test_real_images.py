"""A pre-trained ViT on real VOC images through the same path: losses start where they should, resuming is bit-equal."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.engine.plain import Engine
from cosa_fast.evaluation.networks import load
from cosa_fast.run import checkpoint

SHARED = Path(os.environ.get("COSA_SHARED", Path(__file__).resolve().parents[3] / "shared"))
WEIGHTS = SHARED / "weights" / "deit_small_patch16_224_saliency_fp16.safetensors"
IMAGES = SHARED / "data" / "voc_animals"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (WEIGHTS.is_file() and IMAGES.is_dir()), reason=f"needs {WEIGHTS} and {IMAGES}"),
]


def configuration() -> Config:
    overrides = [
        f"data.root={IMAGES}",
        "data.crop_size=112",
        "model.backbone=deit_small_patch16_224",
        f"model.weights={WEIGHTS}",
        "teacher.scales=[1.0]",
        "optim.batch_size=2",
        "optim.cotrain_after=2",
        "optim.warmup=2",
        "optim.lr=1e-4",
    ]
    return load_config("voc.yaml", overrides)


def run(engine: Engine, iterations: int) -> list[dict[str, float]]:
    """Train on from wherever the engine stands."""
    config = engine.config
    dataset = open_dataset("voc", config.data.root, "train_aug")
    start = engine.iteration * config.optim.batch_size
    stream = iter(TorchPipeline(dataset, config.data, config.optim.batch_size, config.run.seed, start=start))
    return [{name: float(v) for name, v in engine.step(next(stream)).items()} for _ in range(iterations)]


def test_a_vit_starts_at_the_method_s_losses_and_resumes_bit_for_bit(
    tmp_path: Path, same: Callable[[Any, Any], bool]
) -> None:
    config = configuration()
    straight = Engine(config, 20, torch.device("cpu"))
    log = run(straight, 4)
    assert log[0]["cls"] == pytest.approx(math.log(2), abs=0.25)
    assert log[2]["c2s"] == pytest.approx(math.log(21), abs=0.35)

    first = Engine(config, 20, torch.device("cpu"))
    run(first, 3)
    checkpoint.save(tmp_path / "half.pt", first.state_dict())
    second = Engine(config, 20, torch.device("cpu"))
    second.load_state_dict(load(tmp_path / "half.pt"))
    assert run(second, 1) == log[3:]
    assert same(second.state_dict(), straight.state_dict())
