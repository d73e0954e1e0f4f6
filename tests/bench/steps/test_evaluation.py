"""The cost of an evaluation: counted on tensors without contents, and what the committed file says of the recipe."""

import json
from pathlib import Path

import pytest

from bench.steps import evaluation
from cosa_fast.config.parsing import load_config
from cosa_fast.network.build import build_model

RESULT = Path(evaluation.__file__).parents[1] / "results" / "evaluation_cpu.json"
SMALL = [
    "model.weights=none", "model.backbone=test_vit", "model.aux_layer=-2",
    "eval.coexistence=[]", "eval.scales=[1.0]", "teacher.scales=[1.0]", "run.precision=fp32",
]  # fmt: skip


def test_a_batch_costs_less_than_its_images_one_by_one() -> None:
    config = load_config("voc.yaml", SMALL)
    network = build_model(config.model, evaluation.CLASSES)
    alone, together = (evaluation.on_a_gpu(config, network, images, (48, 64)) for images in (1, 4))
    assert together["of_counting"] < alone["of_counting"] / 3
    assert together["operators"] < alone["operators"] / 3
    assert together["gflop"] == pytest.approx(alone["gflop"])
    assert evaluation.cpu_seconds(config, 1, 1)["median"] > 0


def test_the_recipe_s_evaluations_are_at_most_a_tenth_of_a_run() -> None:
    config = load_config("voc.yaml", ["model.weights=none"]).eval
    shares = json.loads(RESULT.read_text())["shares"]
    own = [row for row in shares if (row["networks"], row["every"]) == (config.networks, config.every)]
    assert {row["gpu"] for row in own} == {"H100", "H200"}
    assert all(row["share"] <= 0.1 for row in own)
