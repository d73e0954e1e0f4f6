"""What goes wrong in a run: where to go on from, and what is saved first."""

import math
import multiprocessing
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.views.parameters import image_index
from cosa_fast.engine.base import NonFiniteLoss
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import load
from cosa_fast.method.objective import Objective
from cosa_fast.run import checkpoint, endings
from cosa_fast.run.endings import rise
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.training import train

MakeConfig = Callable[..., Config]


def records(*losses: float) -> list[dict[str, Any]]:
    """A log of every iteration."""
    return [{"kind": "train", "iteration": k, "loss": loss} for k, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "cotrain_after", "risen"),
    [
        ((), 0, None),
        ((1.0,), 0, None),
        ((3.0, 2.0, 1.5, 1.2, 1.1), 0, None),
        ((1.0, 1.1, 0.9, 1.0, 5.0, 90.0), 0, 5),
        ((1.0, 1.1, 9.0, 1.0, 1.2, 0.9), 0, None),  # it came down again
        ((1.0, 1.0, 1.0, 1.0, 4.0, 4.1, 3.9, 4.0), 4, None),  # more terms, no rise
        ((1.0, 1.0, 1.0, 1.0, 4.0, 4.1, 3.9, 30.0), 4, 8),
    ],
)
def test_a_rise_is_a_loss_that_goes_up_and_stays_there(
    losses: tuple[float, ...], cotrain_after: int, risen: int | None
) -> None:
    evaluation = {"kind": "eval_student", "iteration": 2, "seg_label_free": 7.0}
    assert rise([*records(*losses), evaluation], cotrain_after) == risen


@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        (
            (1.0, 1.0, 1.0, 1.0, 1.0),
            r"the state before it is in \S+last_good\.pt: go on from there with a lower optim\.lr",
        ),
        (
            (1.0, 1.0, 1.0, 7.0, 90.0),
            r"the loss rose from iteration 4 on, last_good\.pt has it in it, and 00000003\.pt is from before: "
            r"go on with a lower optim\.lr and --resume \S+00000003\.pt$",
        ),
        ((1.0, 9.0, 9.0, 90.0, 90.0), r".*no checkpoint is from before: start anew, lower optim\.lr$"),
    ],
)
def test_the_advice_leads_to_a_state_from_before_the_loss_rose(
    losses: tuple[float, ...], advice: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints after 3, 4, 5; the sixth step is not finite."""
    step = FusedEngine.step

    def explode(engine: FusedEngine, batch: Batch) -> dict[str, Tensor]:
        if engine.iteration == 5:
            raise NonFiniteLoss(5, "cls")
        return step(engine, batch)

    monkeypatch.setattr(FusedEngine, "step", explode)
    monkeypatch.setattr(endings, "read_log", lambda path: records(*losses))
    with pytest.raises(UserError, match=f"^iteration 5: cls is not finite; {advice}"):
        train(make_config("run.checkpoint_every=1", "run.keep=3", "optim.cotrain_after=0"))


def test_an_unreadable_image_after_a_step_that_nobody_has_checked(
    make_config: MakeConfig, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is named, and what is saved is the state before the step that was not finite."""
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    image = root / "JPEGImages" / f"train_{image_index(0, 6, 8):05d}.jpg"
    image.write_bytes(image.read_bytes()[:700])
    build = Objective.__init__

    def with_infinite_weight(self: Objective, *arguments: Any) -> None:
        build(self, *arguments)
        self.weights["csc"] = math.inf  # from the third step on

    monkeypatch.setattr(Objective, "__init__", with_infinite_weight)
    config = make_config(f"data.root={root}", "optim.cotrain_after=2", "run.log_every=100")
    with pytest.raises(UserError, match=re.escape(str(image))):
        train(config)
    folder = RunFolder.of(config)
    assert folder.kept() == [folder.last_good]
    assert load(folder.last_good)["iteration"] == 2


@pytest.mark.parametrize("moment", ["in a step", "as a checkpoint is written"])
def test_a_killed_worker_ends_the_run_with_its_state_saved(
    moment: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("data.workers=1", "data.prefetch=1", "optim.iterations=20", "run.checkpoint_every=2")
    step, save = FusedEngine.step, checkpoint.save

    def kill() -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()

    def killing_step(engine: FusedEngine, batch: Batch) -> dict[str, Tensor]:
        if engine.iteration == 1 and moment == "in a step":
            kill()
        return step(engine, batch)

    def killing_save(*arguments: Any) -> None:
        if moment == "as a checkpoint is written":
            kill()
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FusedEngine, "step", killing_step)
        patch.setattr(checkpoint, "save", killing_save)
        with pytest.raises(UserError, match=r"^a data\.workers process was killed, most likely for want of memory"):
            train(config)
    newest = checkpoint.latest(RunFolder.of(config))
    assert newest is not None
    assert int(newest.stem) >= 2
    assert load(newest)["iteration"] == int(newest.stem)
    short = make_config("optim.iterations=6", "data.workers=1")
    assert train(short, resume="auto").iteration == 6
