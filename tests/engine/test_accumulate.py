"""A batch that is computed in several parts gives what it gives in one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.distributed import Ranks
from cosa_fast.engine.base import EngineBase
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.plain import Engine
from cosa_fast.errors import UserError

CLASSES = 5  # of the tiny data set
CPU = torch.device("cpu")
RECIPES = {
    "paper": ("loss.energy=1.0",),
    "bands that differ": (
        "threshold.mode=band",
        "threshold.band_aux=[0.2, 0.6]",
        "loss.csc=0",
        "loss.reliability=none",
    ),
    "noise": ("loss.guidance=noise", "model.aux_layer=null"),
}


@pytest.fixture
def uneven(batches: list[Batch]) -> list[Batch]:
    """Batches of four images with very different numbers of valid pixels; one image has none."""

    def joined(a: Batch, b: Batch) -> Batch:
        tensors = {name: torch.cat([getattr(a, name), getattr(b, name)]) for name in ("weak", "strong", "labels")}
        valid = torch.cat([a.valid, b.valid])
        valid[0, 20:] = False
        valid[1] = False
        valid[3, :, :5] = False
        return Batch(**tensors, valid=valid, ids=a.ids + b.ids)

    return [joined(batches[0], batches[1]), joined(batches[2], batches[3])]


def weights(engine: EngineBase) -> Tensor:
    return torch.cat([p.detach().flatten() for p in (*engine.on.master.parameters(), *engine.an.master.parameters())])


@pytest.mark.parametrize("kind", [FusedEngine, Engine])
@pytest.mark.parametrize(("recipe", "parts"), [("paper", 2), ("paper", 4), ("bands that differ", 2), ("noise", 2)])
def test_parts_give_the_metrics_and_weights_of_the_whole(
    kind: type[EngineBase], recipe: str, parts: int, make_config: Callable[..., Config], uneven: list[Batch]
) -> None:
    overrides = ("optim.batch_size=4", "optim.cotrain_after=1", "optim.lr=1e-4", *RECIPES[recipe])
    whole, parted = (kind(make_config(*overrides, f"optim.accumulate={count}"), CLASSES, CPU) for count in (1, parts))
    # Noise is drawn per part, so it is not that of the whole batch: what else the step gives must be.
    free = {"s2c", "loss"} if recipe == "noise" else set()
    for batch in (uneven[0], uneven[1], uneven[0]):
        expected, found = whole.step(batch), parted.step(batch)
        parted.check()
        assert expected.keys() == found.keys()
        for name in expected.keys() - free:
            torch.testing.assert_close(
                found[name], expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        if free:
            return
    a, b = weights(parted), weights(whole)
    assert (a - b).norm() / b.norm() < 1e-6


def test_half_precision_parts_are_summed_in_single_precision(
    make_config: Callable[..., Config], uneven: list[Batch]
) -> None:
    config = make_config("optim.batch_size=4", "optim.accumulate=4", "run.precision=bf16", "optim.cotrain_after=0")
    engine = FusedEngine(config, CLASSES, CPU)
    engine.step(uneven[0])
    assert engine.networks.gradients.dtype == torch.float32
    rounded = engine.networks.gradients.bfloat16().float()
    assert not torch.equal(rounded, engine.networks.gradients)


def test_a_bad_number_in_a_later_part_changes_nothing(make_config: Callable[..., Config], uneven: list[Batch]) -> None:
    engine = Engine(make_config("optim.batch_size=4", "optim.accumulate=2", "optim.cotrain_after=0"), CLASSES, CPU)
    before = weights(engine).clone()
    bad = uneven[0].map(torch.clone)
    bad.strong[3, 0, 3, 3] = float("nan")
    with pytest.raises(Exception, match="iteration 0: cls is not finite"):
        engine.step(bad)
    assert torch.equal(weights(engine), before)
    assert engine.iteration == 0


def test_parts_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.accumulate = 3 must divide the 4 images that each process has"):
        Ranks(0, 2, 0).share(8, 3)
