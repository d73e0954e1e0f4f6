"""The prediction counts what a step computes, and its committed file is what it says today."""

import json
from pathlib import Path

import pytest
import torch

from bench.steps import prediction
from bench.steps.providers import BACKBONES
from cosa_fast.config.parsing import load_config
from cosa_fast.engine.base import PHASES
from cosa_fast.engine.flops import step_flops
from cosa_fast.network.build import build_model

RESULT = Path(prediction.__file__).parents[1] / "results" / "step_predicted.json"


@pytest.mark.parametrize("vit", prediction.VITS, ids=lambda vit: vit.name)
def test_its_operations_are_those_of_the_step(vit: prediction.Vit) -> None:
    config = load_config("voc.yaml", ["model.weights=none", f"model.backbone={BACKBONES[vit.name]}"])
    with torch.device("meta"):
        network = build_model(config.model, 20)
    counted = step_flops(network, config, cotraining=True)
    row = prediction.predict(vit, config.optim.batch_size, prediction.GPUS[0])
    # The classifiers and what the first layer sends to the images are left out.
    assert row["gflop"] == pytest.approx(counted / 1e9, rel=0.03)


def test_its_parts_add_up_and_bear_the_engines_names() -> None:
    row = prediction.predict(prediction.VITS[1], 16, prediction.GPUS[1])
    assert set(row["phases_ms"]) == set(PHASES)
    assert sum(row["phases_ms"].values()) == pytest.approx(row["ms"])
    assert sum(part["ms"] for part in row["parts"]) == pytest.approx(row["ms"])
    assert row["images_per_second"] == pytest.approx(16e3 / row["ms"])
    # No faster than its operations at the matrix rate, no slower than six times that.
    least = row["gflop"] * 1e9 / prediction.GPUS[1].matrix * 1e3
    assert least < row["ms"] < 6 * least


def test_the_committed_file_is_what_it_predicts(tmp_path: Path) -> None:
    assert prediction.main(["--out", str(tmp_path / "found.json")]) == 0
    found, committed = (json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "found.json", RESULT))
    assert found["gpus"] == committed["gpus"]
    for a, b in zip(found["rows"], committed["rows"], strict=True):
        assert a["ms"] == pytest.approx(b["ms"])
        assert a["phases_ms"] == pytest.approx(b["phases_ms"])
