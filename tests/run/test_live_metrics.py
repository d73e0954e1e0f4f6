"""The speed that a run logs: FLOPs of its steps, and a GPU's memory."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.flops import UncountableError, step_flops
from cosa_fast.engine.plain import Engine
from cosa_fast.run.log import StepTimer
from cosa_fast.run.training import train

MakeEngine = Callable[..., Engine]
CPU = torch.device("cpu")


def tiny_vit_forward(images: int, seg: bool, grid: int = 8, classes: int = 5) -> int:
    """FLOPs of the tiny network by hand: dimension 48, depth 3, patches of 8, a decoder of width 16. Of the
    classifiers Z is a product per image and M one per token."""
    width, tokens = 48, grid * grid + 1
    patches = 2 * grid * grid * 3 * 8 * 8 * width
    block = 2 * tokens * 12 * width * width + 2 * 2 * tokens * tokens * width
    heads = 2 * (2 * width * classes * (grid * grid + 1))
    decoder = 2 * grid * grid * (9 * width * 16 + 9 * 16 * 16 + 16 * (classes + 1))
    return images * (patches + 3 * block + heads + (decoder if seg else 0))


def test_flops_are_those_of_the_formula(make_engine: MakeEngine) -> None:
    """Backward: twice the forward, except that the images get no gradient."""
    engine = make_engine()
    patches = 2 * (2 * 8 * 8 * 3 * 8 * 8 * 48)
    alone = step_flops(engine.on.master, engine.config, cotraining=False)
    assert alone == 3 * tiny_vit_forward(2, seg=False) - patches

    both = step_flops(engine.on.master, engine.config, cotraining=True)
    scales = sum(tiny_vit_forward(4, seg=True, grid=grid) for grid in (8, 4, 12))
    assert both == 3 * tiny_vit_forward(2, seg=True) - patches + scales


def test_a_network_that_cannot_run_without_data_says_so(
    make_engine: MakeEngine, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_data(images: Tensor) -> None:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    network = make_engine().on.master
    monkeypatch.setattr(type(network.encoder), "forward", lambda self, images: needs_data(images))
    with pytest.raises(UncountableError, match=r"vit_tiny_patch16_224 does not run without data \(Cannot copy out of"):
        step_flops(network, make_config(), cotraining=False)


def test_recomputed_blocks_count_once(make_engine: MakeEngine) -> None:
    engines = [make_engine(f"model.checkpoint_blocks={value}") for value in ("false", "true")]
    counts = [step_flops(engine.on.master, engine.config, cotraining=True) for engine in engines]
    assert counts[0] == counts[1]
    assert engines[1].on.master.encoder.checkpoint_blocks


@pytest.mark.parametrize("backbone", ["vit", "cnn"])
def test_counting_changes_nothing(
    backbone: str, make_engine: MakeEngine, batches: list[Batch], same: Callable[[object, object], bool]
) -> None:
    config = make_engine().config
    if backbone == "cnn":
        config = replace(config, model=replace(config.model, backbone="resnet10t", arguments={}, aux_layer=-1))
    engines = [Engine(config, 5, CPU) for _ in range(2)]
    assert step_flops(engines[0].on.master, config, cotraining=True) > 0
    for engine in engines:
        engine.step(batches[0])
    assert same(*(engine.state_dict() for engine in engines))


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_log_has_the_flops_of_each_phase(engine: str, make_config: Callable[..., Config]) -> None:
    config = make_config(f"run.engine={engine}", "optim.iterations=2", "optim.cotrain_after=1")
    lines = [json.loads(line) for line in (train(config).directory / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    student = Engine(config, 5, CPU).on.master
    for line in lines:
        expected = step_flops(student, config, cotraining=line["iteration"] > config.optim.cotrain_after)
        assert line["tflop_per_second"] * line["seconds_per_iteration"] * 1e12 == pytest.approx(expected)
        assert "peak_memory_mib" not in line


def test_unknown_flops_leave_the_figure_out_until_the_next_read() -> None:
    timer = StepTimer(CPU)
    timer.step_ended(0.0, 10)
    timer.step_ended(0.0, None)
    assert "tflop_per_second" not in timer.read(1)
    timer.step_ended(0.0, 10)
    assert timer.read(1)["tflop_per_second"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_is_that_since_the_last_read() -> None:
    device = torch.device("cuda")
    timer = StepTimer(device)
    before = torch.cuda.memory_allocated()
    block = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    del block
    assert timer.read(1)["peak_memory_mib"] == pytest.approx(before / 2**20 + 64, abs=1)
    assert timer.read(1)["peak_memory_mib"] == pytest.approx(before / 2**20, abs=1)
    assert timer.read(1, replayed_peak=2**40)["peak_memory_mib"] == 2**20
