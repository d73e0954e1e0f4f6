"""A probe finds what features tell, and no more."""

from pathlib import Path

import numpy as np
import pytest

from bench.runs.probe import average_precisions, main
from cosa_fast.errors import UserError


def test_features_that_tell_a_class_and_such_that_do_not() -> None:
    rng = np.random.default_rng(0)

    def draw(images: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 2, (images, 3)).astype(float)
        labels[:, 2] = 0
        features = rng.normal(size=(images, 4))
        features[:, 1] += 4 * labels[:, 0]
        return features, labels

    found = average_precisions(draw(120), draw(120), ("told", "hidden", "absent"))
    assert found.keys() == {"told", "hidden"}
    assert found["told"] > 95
    assert 35 < found["hidden"] < 70
    with pytest.raises(UserError, match="no class has 10 images"):
        average_precisions(draw(12), draw(12), ("told", "hidden", "absent"))


def test_the_door_runs_the_encoder_on_crops(data_root: Path) -> None:
    settings = [f"data.root={data_root}", "data.crop_size=32", "data.workers=0", "optim.batch_size=2"]
    with pytest.raises(UserError, match="no class has 10 images with it and 10 without it in both sets"):
        main(["demo.yaml", "data.format=voc", *settings, "--images", "4"])
