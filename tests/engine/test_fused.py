"""The fused engine computes what the plain one does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_support import aten_operators

from cosa_fast.config.parsing import config_from_dict
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.base import EngineBase, NonFiniteLoss
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.plain import Engine
from cosa_fast.kernels.launch.runtime import record_launches

CLASSES = 5  # of the tiny data set
CPU = torch.device("cpu")


def relative(found: EngineBase, expected: EngineBase) -> float:
    """Difference of both networks' weights, relative to their norm."""
    a, b = (
        torch.cat([p.detach().flatten() for network in (e.on.master, e.an.master) for p in network.parameters()])
        for e in (found, expected)
    )
    return float((a - b).norm() / b.norm())


# Of a CNN only the first steps: where two tokens nearly tie, the maximum of its pooling soon tells the engines apart.
@pytest.mark.parametrize(("backbone", "iterations", "cotrain_after"), [("vit", 16, 6), ("cnn", 3, 1)])
def test_iterations_across_the_phases_agree(
    backbone: str, iterations: int, cotrain_after: int, make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    config = make_config(f"optim.cotrain_after={cotrain_after}", "optim.iterations=60", "optim.lr=1e-4")
    if backbone == "cnn":
        config = replace(config, model=replace(config.model, backbone="test_resnet", arguments={}, aux_layer=-1))
    plain, fused = Engine(config, CLASSES, CPU), FusedEngine(config, CLASSES, CPU)
    for iteration in range(iterations):
        batch = batches[iteration % len(batches)]
        expected, found = plain.step(batch), fused.step(batch)
        fused.check()
        assert expected.keys() == found.keys()
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
    assert relative(fused, plain) < 1e-5


@pytest.mark.parametrize("kinds", [(Engine, FusedEngine), (FusedEngine, Engine), (FusedEngine, FusedEngine)])
def test_engines_read_each_others_state(
    kinds: tuple[type[EngineBase], type[EngineBase]], make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    config = make_config("optim.cotrain_after=2")
    first, second = (kind(config, CLASSES, CPU) for kind in kinds)
    for batch in batches[:3]:
        first.step(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[:2]:
        first.step(batch)
        second.step(batch)
    assert first.iteration == second.iteration == 5
    assert relative(second, first) < (1e-7 if kinds[0] is kinds[1] else 1e-5)


def test_half_precision_follows_single_precision(make_config: Callable[..., Config], batches: list[Batch]) -> None:
    engines = [
        FusedEngine(make_config("optim.cotrain_after=4", f"run.precision={name}"), CLASSES, CPU)
        for name in ("fp32", "bf16")
    ]
    for iteration in range(12):
        expected, found = (engine.step(batches[iteration % 4]) for engine in engines)
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=0.05, atol=0.02)
    single, half = engines
    assert next(half.on.compute.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in half.on.master.parameters())
    for name, master in half.on.master.named_parameters():
        if master.requires_grad:
            assert torch.equal(half.on.compute.get_parameter(name), master.to(torch.bfloat16)), name
    assert relative(half, single) < 0.05


def test_what_packs_its_scales_does_so_in_evaluation_too(make_config: Callable[..., Config]) -> None:
    """Evaluation looks at the float32 networks, training computes with others; kernels by name are training's."""
    overrides = ("run.precision=bf16", "teacher.attention=packed", "model.attention=flash")
    engine = FusedEngine(make_config(*overrides), CLASSES, CPU)
    assert engine.an.master is not engine.an.compute
    assert (engine.an.master.is_packed, engine.an.compute.is_packed) == (True, True)
    assert (engine.on.master.encoder.attention, engine.on.compute.encoder.attention) == ("sdpa", "flash")


VIT = ()
CNN = ("model.backbone=tf_efficientnet_lite0", "model.aux_layer=-1")


@pytest.mark.parametrize("kind", [Engine, FusedEngine])
@pytest.mark.parametrize("backbone", [VIT, CNN], ids=["vit", "cnn"])
def test_what_is_computed_with_follows_a_load(
    backbone: tuple[str, ...],
    kind: type[EngineBase],
    tiny_values: dict[str, Any],
    make_config: Callable[..., Config],
    batches: list[Batch],
) -> None:
    """Also what is not trained: position embedding, statistics of batch norms. The state may be of either engine."""
    if backbone:
        tiny_values = {**tiny_values, "model": {**tiny_values["model"], "arguments": {}}}
    config = config_from_dict(tiny_values, [*backbone, "run.precision=bf16"], where="test")
    source = kind(replace(config, run=replace(config.run, seed=1)), CLASSES, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in (source.on.master, source.an.master):
            for name, tensor in network.state_dict().items():
                if "pos_embed" in name or "running" in name:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)

    engine = FusedEngine(config, CLASSES, CPU)
    engine.load_state_dict(source.state_dict())

    for network in (engine.on, engine.an):
        masters, copies = network.master.state_dict(), network.compute.state_dict()
        assert [name for name in masters if "pos_embed" in name or "running" in name]
        for name, master in masters.items():
            assert torch.equal(copies[name], master.to(copies[name].dtype)), name
        images = batches[0].weak
        with torch.no_grad():
            expected = network.master.eval()(images).cam
            found = network.compute.eval()(images.to(torch.bfloat16)).cam
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.06 * float(expected.abs().max()))


def test_a_bad_number_stops_every_later_update(
    make_config: Callable[..., Config], batches: list[Batch], same: Callable[[object, object], bool]
) -> None:
    engine = FusedEngine(make_config("optim.cotrain_after=0"), CLASSES, CPU)
    engine.step(batches[0])
    engine.check()
    good = {name: value.clone() for name, value in engine.on.master.state_dict().items()}
    thresholds = [threshold.state_dict() for threshold in engine.thresholds]
    moments = engine.state_dict()["optimizer"]
    bad = batches[1].to("cpu")
    bad.strong = bad.strong.clone()
    bad.strong[0, 0, 3, 3] = float("nan")
    engine.step(bad)
    engine.step(batches[2])
    with pytest.raises(NonFiniteLoss, match="iteration 1: cls is not finite"):
        engine.check()
    assert engine.iteration == 1
    assert same(good, dict(engine.on.master.state_dict()))
    assert same(thresholds, [threshold.state_dict() for threshold in engine.thresholds])
    assert same(moments, engine.state_dict()["optimizer"])


@pytest.mark.parametrize(
    "options",
    [
        ("optim.cotrain_after=0",),
        ("optim.cotrain_after=100",),
        ("optim.cotrain_after=0", "optim.accumulate=2", "teacher.attention=packed", "run.precision=bf16"),
        ("optim.cotrain_after=0", "loss.energy=1.0"),
    ],
)
def test_a_step_neither_reads_from_the_device_nor_copies_from_the_host(
    options: tuple[str, ...], make_config: Callable[..., Config], batches: list[Batch]
) -> None:
    config = make_config(*options, "optim.iterations=200", "run.backend=triton")
    engine = FusedEngine(config, CLASSES, CPU)
    with record_launches("sm_90"):  # kernels are collected, not run: the interpreter itself reads values
        engine.step(batches[0])  # plans the optimiser's runs, once per phase
        found = aten_operators(lambda: engine.step(batches[1]))
    assert "_foreach_copy_" in found
    # lift_fresh: a tensor of Python numbers, which no captured step may copy to the device.
    assert not {"_local_scalar_dense", "item", "nonzero", "lift_fresh"} & set(found)
