"""The step of CoSA-MS: it learns its pseudo-labels, and leaves a state that a bad batch has not touched."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.distributed import Ranks
from cosa_fast.engine.base import NonFiniteLoss
from cosa_fast.engine.standalone import StandaloneEngine
from cosa_fast.errors import UserError
from cosa_fast.method.supervised import pseudo_label_terms

pytest.importorskip("segmentation_models_pytorch")
MakeConfig = Callable[..., Config]
CLASSES = 5


def engine(make_standalone: MakeConfig, *overrides: str) -> StandaloneEngine:
    torch.set_num_threads(1)
    return StandaloneEngine(make_standalone(*overrides), CLASSES, torch.device("cpu"))


def test_the_loss_is_the_mean_over_pixels_that_have_a_pseudo_label() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES + 1, 5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    truth = torch.randint(0, CLASSES + 1, (2, 5, 7), generator=generator, dtype=torch.uint8)
    truth[0, :3] = 255
    known = truth != 255
    logs = logits.log_softmax(1).movedim(1, -1)[known]
    wanted = -logs.gather(1, truth[known].long()[:, None]).mean()
    terms = pseudo_label_terms(logits, truth)
    torch.testing.assert_close(terms["loss"].double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms["foreground_share"], (truth[known] > 0).float().mean())
    wide = truth.short().masked_fill(~known, -1)
    assert torch.equal(pseudo_label_terms(logits, wide)["loss"], terms["loss"])
    nothing = pseudo_label_terms(logits, torch.full_like(truth, 255))["loss"]
    nothing.backward()
    assert nothing == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_it_learns_the_pseudo_labels_of_a_batch(make_standalone: MakeConfig, batches: list[Batch]) -> None:
    ours = engine(make_standalone, "optim.iterations=60", "optim.lr=3e-3", "optim.warmup=0")
    first = ours.step(batches[0])
    for _ in range(24):
        last = ours.step(batches[0])
    assert first["pseudo_label_repeated"] < 0.6
    assert last["pseudo_label_repeated"] > 0.85
    assert last["loss"] < 0.5 * first["loss"]


def test_a_batch_that_is_not_finite_changes_nothing(
    make_standalone: MakeConfig, batches: list[Batch], same: Callable[..., bool]
) -> None:
    ours = engine(make_standalone)
    ours.step(batches[0])
    before = {name: value.clone() for name, value in ours.network.state_dict().items()}
    bad = replace(batches[1], strong=batches[1].strong.clone().fill_(float("nan")))
    with pytest.raises(NonFiniteLoss, match="loss is not finite"):
        ours.step(bad)
    assert ours.iteration == 1
    assert same(dict(ours.network.state_dict()), before), "running statistics of batch norm included"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.batch_size=1", "needs two images or more"),
        ("optim.accumulate=2", r"must see whole batches; set it to 1"),
    ],
)
def test_batches_that_its_batch_norm_cannot_see_whole_are_refused(
    override: str, message: str, make_standalone: MakeConfig
) -> None:
    with pytest.raises(UserError, match=message):
        engine(make_standalone, override)


def test_several_processes_are_refused(make_standalone: MakeConfig) -> None:
    with pytest.raises(UserError, match="trains in one process, not in 2; start without torchrun"):
        StandaloneEngine(make_standalone(), CLASSES, torch.device("cpu"), Ranks(0, 2, 0))
