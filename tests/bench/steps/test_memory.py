"""Predicted memory is what a step really takes, as far as a CPU can show it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_support import assert_keys_of
from torch import Tensor

from bench import memory
from bench.steps.memory import LiveBytes, largest, predict
from bench.steps.providers import synthetic_batch
from bench.timing import extra_memory
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.network.build import build_model

CPU = torch.device("cpu")
CLASSES = 5
# Large enough images that activations, not the last few kilobytes, decide.
SMALL = [
    "model.backbone=vit_tiny_patch16_224", "model.weights=none", "data.crop_size=128", "optim.batch_size=4",
    "teacher.scales=[1.0,0.5]", "model.decoder_width=64", "run.device=cpu", "run.precision=fp32",
    'model.arguments={embed_dim: 96, depth: 4, num_heads: 3}',
]  # fmt: skip


def small(*overrides: str) -> Config:
    return load_config("voc.yaml", [*SMALL, *overrides])


def second_step(config: Config) -> tuple[Callable[[], list[Tensor]], int]:
    """An engine's next step after its first, without gradients from there, and how many bytes those had."""
    engine = FusedEngine(config, CLASSES, CPU)
    batch = synthetic_batch(config, CLASSES, CPU)
    engine.run(batch)
    gradients = sum(p.grad.nbytes for p in engine.on.compute.parameters() if p.grad is not None)
    engine.networks.clear_gradients()  # the profiler does not see the end of what it did not see begin
    return lambda: [engine.run(batch)["loss"]], gradients


@pytest.mark.parametrize("recompute", [False, True])
def test_the_prediction_is_what_the_allocator_measures(recompute: bool) -> None:
    # The classification phase: what follows it runs other operators on a CPU than on a GPU. And images so large that
    # the optimiser, which on a CPU has temporary buffers, decides nothing.
    config = small(
        f"model.checkpoint_blocks={recompute}", "optim.cotrain_after=100", "data.crop_size=320", "optim.batch_size=8"
    )
    step, gradients = second_step(config)
    expected = extra_memory(step, CPU) - gradients
    found = predict(config, build_model(config.model, CLASSES), cotraining=False)
    # Within a tenth: the CPU's operators hold a few temporary tensors that the count does not see.
    assert found["step"] == pytest.approx(expected, rel=0.1)
    assert found["peak"] == found["static"] + found["step"]


def test_the_count_of_a_whole_cotraining_step_is_that_of_the_allocator() -> None:
    config = small("optim.cotrain_after=0", "threshold.mode=fixed")
    step, _ = second_step(config)
    with LiveBytes() as live:
        step()
    step, _ = second_step(config)
    assert live.peak == pytest.approx(extra_memory(step, CPU), rel=0.1)


def test_what_stays_between_steps_is_counted_exactly() -> None:
    config = small("optim.cotrain_after=0", "run.precision=bf16")
    network = build_model(config.model, CLASSES)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    found = predict(config, network)
    images = 2 * config.optim.batch_size * 128 * 128 * (2 * 3 * 4 + 1)
    # float32: masters, moving average, two moments; bfloat16: both networks, gradients and their flat buffer.
    queues = 2 * config.threshold.queue_length * config.threshold.bins * 4
    assert found["static"] == pytest.approx(trained * (4 * 4 + 4 * 2) + images + queues, rel=0.02)


def test_more_images_take_more_and_recomputed_blocks_less() -> None:
    def step(**changes: Any) -> int:
        config = small(*(f"{key.replace('__', '.')}={value}" for key, value in changes.items()))
        return predict(config, build_model(config.model, CLASSES))["step"]

    plain = step(optim__batch_size=4)
    assert step(optim__batch_size=8) == pytest.approx(2 * plain, rel=0.15)
    assert step(optim__batch_size=4, model__checkpoint_blocks=True) < 0.8 * plain
    assert step(optim__batch_size=4, optim__accumulate=4) < 0.6 * plain
    assert step(optim__batch_size=4, run__precision="bf16") < 0.8 * plain


def test_the_largest_batch_leaves_room_for_slack_and_context() -> None:
    rows = [
        {"backbone": "a", "checkpoint_blocks": False, "batch_size": size, "peak_mib": peak}
        for size, peak in ((1, 1000), (2, 6800), (4, 7000))
    ]
    assert largest(rows, "a", False, 8) == 2  # 7000 MiB · 1.1 + 512 MiB is more than 8 GiB
    assert largest(rows, "a", False, 1) is None
    assert largest(rows, "a", True, 8) is None


def test_the_door_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.steps.memory.BACKBONES", {"tiny": "vit_tiny_patch16_224"})
    out = tmp_path / "memory.json"
    assert memory.main([*SMALL[2:], "--batch-sizes", "2", "1", "--out", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert_keys_of("memory_predicted.json", written)
    rows = written["rows"]
    assert [(row["checkpoint_blocks"], row["batch_size"]) for row in rows] == [
        (False, 2), (False, 1), (True, 2), (True, 1),
    ]  # fmt: skip
    kept = f"| tiny | kept | {rows[0]['static_mib'] / 1024:.1f} | "
    assert kept + " | ".join(f"{row['peak_mib'] / 1024:.1f}" for row in rows[:2]) + " |" in capsys.readouterr().out
