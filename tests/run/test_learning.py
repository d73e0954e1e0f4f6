"""Training learns: on the demo's images, the segmentation taught by image labels alone beats what needs no learning."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cosa_fast.config.parsing import load_config
from cosa_fast.data_pipeline.datasets.synthetic import generate
from cosa_fast.evaluation.metrics import ConfusionMatrix
from cosa_fast.run.data import open_datasets
from cosa_fast.run.training import train


@pytest.mark.slow
def test_segmentation_rises_above_the_all_background_baseline(tmp_path: Path) -> None:
    """A shorter schedule than the demo's, of smaller batches, evaluated on fewer images. The baseline is the best
    constant answer: everything is background."""
    generate(tmp_path / "data", train=200, val=30)
    config = load_config(
        "demo.yaml",
        [
            f"data.root={tmp_path / 'data'}",
            f"run.output={tmp_path / 'runs'}",
            "eval.scales=[1.0]",
            "optim.iterations=150",
            "optim.cotrain_after=50",
            "optim.warmup=20",
            "optim.batch_size=8",
        ],
    )
    results = train(config).results

    validation_set = open_datasets(config)[1]
    constant = ConfusionMatrix(len(validation_set.classes) + 1, "cpu")
    for index in range(len(validation_set)):
        truth = torch.from_numpy(validation_set.mask(index).astype(np.int64))
        constant.update(torch.zeros_like(truth), truth)
    baseline = 100 * float(constant.miou(None))
    for network in ("on", "an"):
        assert results[network].label_free.miou > baseline + 20
        assert results[network].label_aware.miou >= results[network].label_free.miou
        assert results[network].cam.best.miou > baseline + 30
