"""The method as it is usually written computes what ours does: else comparing their speed means nothing."""

import numpy as np
import pytest
import torch

from bench.steps.baseline import Baseline, BaselineLosses
from bench.steps.lattice import lattice_filter
from bench.steps.providers import synthetic_batch
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.plain import Engine
from cosa_fast.errors import UserError
from cosa_fast.method.threshold import build_thresholds

CPU = torch.device("cpu")
CLASSES = 5
SMALL = [
    "model.backbone=vit_tiny_patch16_224", "model.weights=none", "data.crop_size=128", "optim.batch_size=3",
    "teacher.scales=[1.0,0.5]", "run.device=cpu", "threshold.queue_length=4", "model.decoder_width=16",
    "optim.cotrain_after=0", "model.arguments={embed_dim: 48, depth: 3, num_heads: 3}",
]  # fmt: skip


def small(name: str, *overrides: str) -> Config:
    return load_config(name, [*SMALL, *overrides])


@pytest.fixture(scope="module")
def batch() -> Batch:
    return synthetic_batch(small("voc.yaml"), CLASSES, CPU)


FIXED = ["threshold.mode=fixed", "threshold.value=0.4", "threshold.value_aux=0.5"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("voc.yaml", FIXED), ("voc.yaml", [*FIXED, "loss.csc_vectors=logits"]), ("voc_published.yaml", [])],
)
def test_every_term_is_that_of_the_engine(name: str, overrides: list[str], batch: Batch) -> None:
    config = small(name, *overrides)
    expected = Engine(config, CLASSES, CPU).step(batch)
    found = Baseline(config, CLASSES, CPU, bf16=False, compiled=False).step(batch)
    terms = set(found) - {"loss", "energy"}
    assert terms == {"cls", "cls_aux", "c2s", "c2s_aux", "s2c"} | ({"csc"} if config.loss.csc else set())
    for term in terms:
        assert found[term] == pytest.approx(float(expected[term]), rel=1e-4), term
    if config.loss.energy:  # a lattice's sums are about half of the exact ones
        assert 0.3 < found["energy"] / float(expected["energy"]) < 1.2


def test_the_fitted_threshold_is_that_of_the_engine() -> None:
    config = small("voc.yaml", "threshold.smoothing=0")
    generator = torch.Generator().manual_seed(0)
    modes = (
        0.3 + 0.1 * torch.randn(2, 40, 40, generator=generator),
        0.7 + 0.08 * torch.randn(1, 40, 40, generator=generator),
    )
    confidence = torch.cat(modes).clamp(0, 1)
    ours = build_thresholds(config.threshold, CPU, "auto")[0]
    ours.update(confidence, torch.ones_like(confidence, dtype=torch.bool))
    found = BaselineLosses(config).threshold("cam", confidence.flatten())
    assert found == pytest.approx(float(ours.value), abs=0.01)  # the baseline's is one of 181 splits


def test_gradients_are_those_of_the_engine(batch: Batch) -> None:
    config = small("voc.yaml", "threshold.mode=fixed", "optim.lr=1e-4")
    engine, baseline = Engine(config, CLASSES, CPU), Baseline(config, CLASSES, CPU, bf16=False, compiled=False)
    for _ in range(2):  # of the second step the losses are those after one update
        expected, found = engine.step(batch), baseline.step(batch)
    assert found["loss"] == pytest.approx(float(expected["loss"]), rel=1e-4)


def test_the_lattice_filters_as_that_of_the_field_does() -> None:
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    generator, side, weight = np.random.default_rng(0), 48, 0.01
    coarse = generator.random((side // 8, side // 8, 3))
    image = (np.kron(coarse, np.ones((8, 8, 1))) * 255).astype(np.uint8)
    probability = generator.random((2, side * side)).astype(np.float32) + 0.1
    probability /= probability.sum(0)
    crf = densecrf.DenseCRF2D(side, side, 2)
    crf.setUnaryEnergy(-np.log(probability))
    crf.addPairwiseBilateral(sxy=10, srgb=15, rgbim=image, compat=weight, normalization=densecrf.NO_NORMALIZATION)
    state, first, second = crf.startInference()
    crf.stepInference(state, first, second)
    after = np.log(np.array(state))
    # One step adds weight · (filtered probabilities) to the logits.
    expected = (after[0] - after[1]) - np.log(probability[0] / probability[1])
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    features = np.concatenate([np.stack([columns, rows]).reshape(2, -1) / 10, image.reshape(-1, 3).T / 15])
    filtered = lattice_filter(np.ascontiguousarray(probability.T), np.ascontiguousarray(features.T, dtype=np.float32))
    found = weight * (filtered[:, 0] - filtered[:, 1])
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("override", ["loss.csc_scope=batch", "loss.guidance=noise", "teacher.flip=false"])
def test_what_the_baseline_lacks_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=rf"{override.split('=')[0]}.*--providers ours"):
        BaselineLosses(small("voc.yaml", override))
