"""A run that was interrupted ends bit for bit as the one that was not."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from cosa_fast.config.parsing import config_from_dict, config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import load
from cosa_fast.run import checkpoint
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.training import train
from cosa_fast.train import main

Same = Callable[[Any, Any], bool]
# Of log.jsonl: everything but the clock's.
CLOCK = ("images_per_second", "seconds_per_iteration", "data_wait", "tflop_per_second")


def log(directory: Path) -> list[dict[str, Any]]:
    """The records of a run without those that depend on the clock."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def final(directory: Path) -> dict[str, Any]:
    """The newest checkpoint, without the settings and names of the run."""
    path = checkpoint.latest(RunFolder(directory))
    assert path is not None
    return {key: value for key, value in load(path).items() if key != "config"}


@pytest.fixture(scope="module")
def straight(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations without a break, co-training after the third, a checkpoint after each."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("straight")
    overrides = [f"run.output={output}", "run.checkpoint_every=1"]
    return train(config_from_dict(tiny_values, overrides, where="tiny")).directory


def interrupted(straight: Path, directory: Path, iteration: int) -> None:
    """The folder of a run that ended after `iteration`."""
    (directory / "checkpoints").mkdir(parents=True)
    for number in range(1, iteration + 1):
        shutil.copy(RunFolder(straight).checkpoint(number), RunFolder(directory).checkpoint(number))


def flip_a_bit(path: Path) -> None:
    """In the middle of the file, where the weights are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_auto_passes_over_a_damaged_checkpoint(
    damage: Callable[[Path], None],
    straight: Path,
    make_config: Callable[..., Config],
    same: Same,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config()
    folder = RunFolder.of(config)
    interrupted(straight, folder.path, 4)
    damage(folder.checkpoint(4))
    folder.manifest.write_text('{"seed": ')  # what a killed writer of another program may leave

    summary = train(config, resume="auto")

    said = capsys.readouterr().out
    assert "00000004.pt: " in said
    assert "going on from 00000003.pt, iteration 3" in said
    assert summary.iteration == 6
    assert same(final(folder.path), final(straight))
    assert json.loads(folder.manifest.read_text(encoding="utf-8"))["iteration"] == 3


def test_auto_takes_the_best_where_nothing_else_is_left(
    straight: Path, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    folder = RunFolder.of(config)
    folder.best.parent.mkdir(parents=True)
    shutil.copy(RunFolder(straight).checkpoint(2), folder.best)

    train(config, resume="auto")

    assert "going on from best.pt, iteration 2" in capsys.readouterr().out
    assert [line["iteration"] for line in log(folder.path) if line["kind"] == "train"] == [3, 4, 5, 6]


def test_where_no_checkpoint_is_whole_nothing_is_overwritten(
    straight: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config()
    folder = RunFolder.of(config)
    interrupted(straight, folder.path, 2)
    for number in (1, 2):
        flip_a_bit(folder.checkpoint(number))
    before = {path: path.read_bytes() for path in folder.numbered()}

    with pytest.raises(UserError, match=r"no checkpoint is whole; replace the run with --overwrite \(checkpoint "):
        train(config, resume="auto")
    assert {path: path.read_bytes() for path in folder.numbered()} == before


@pytest.mark.parametrize(
    ("iteration", "workers"),
    [(2, 2), (3, 0), (5, 0)],
    ids=["first phase, workers", "phase change", "co-training"],
)
def test_resumed_run_equals_the_straight_one(
    iteration: int, workers: int, straight: Path, make_config: Callable[..., Config], same: Same
) -> None:
    """Weights of ON and AN, moments, thresholds, best score, and every logged figure."""
    config = make_config(f"data.workers={workers}")
    directory = Path(config.run.output) / config.run.name
    interrupted(straight, directory, iteration)

    summary = train(config, resume="auto")

    assert summary.iteration == 6
    assert same(final(directory), final(straight))
    whole = log(straight)
    assert log(directory) == [line for line in whole if line["iteration"] > iteration]
    assert [line["iteration"] for line in whole if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_resuming_from_a_named_checkpoint(
    straight: Path, make_config: Callable[..., Config], same: Same, tmp_path: Path
) -> None:
    config = make_config("run.name=other")
    train(config, resume=str(straight / "checkpoints" / "00000005.pt"))
    assert same(final(tmp_path / "runs" / "other"), final(straight))


def test_resuming_a_finished_run_evaluates_again(
    straight: Path, make_config: Callable[..., Config], same: Same, tmp_path: Path
) -> None:
    """Also from another folder: the new run is then complete, with a checkpoint of its own."""
    config = make_config("run.name=other")
    summary = train(config, resume=str(straight / "checkpoints" / "00000006.pt"))

    assert summary.results.keys() == {"on", "an"}
    assert same(final(tmp_path / "runs" / "other"), final(straight))


def test_auto_with_nothing_there_starts_fresh_and_the_same_seed_gives_the_same_run(
    straight: Path, make_config: Callable[..., Config], same: Same
) -> None:
    summary = train(make_config("data.workers=2"), resume="auto")
    assert same(final(summary.directory), final(straight))
    assert log(summary.directory) == log(straight)


def test_the_best_score_is_remembered(straight: Path, make_config: Callable[..., Config]) -> None:
    """A worse evaluation after the resumption must not replace best.pt."""
    config = make_config()
    directory = Path(config.run.output) / config.run.name
    state = load(straight / "checkpoints" / "00000005.pt")
    checkpoint.save(directory / "checkpoints" / "00000005.pt", {**state, "best": 99.0})
    train(config, resume="auto")

    assert final(directory)["best"] == 99.0
    assert not (directory / "checkpoints" / "best.pt").exists()


def test_another_seed_gives_another_run(straight: Path, make_config: Callable[..., Config], same: Same) -> None:
    other = train(make_config("run.seed=1", "optim.iterations=1", "optim.cotrain_after=1"))
    assert log(other.directory)[0]["loss"] != log(straight)[0]["loss"]
    first = load(RunFolder(straight).checkpoint(1))["student"]
    assert not same(final(other.directory)["student"], first)


def test_other_settings_are_announced_and_used(
    straight: Path, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("optim.weight_decay=0.3", "run.log_every=2")
    interrupted(straight, Path(config.run.output) / config.run.name, 5)
    summary = train(config, resume="auto")

    printed = capsys.readouterr().out
    assert "optim.weight_decay: 0.01 -> 0.3" in printed
    assert "log_every" not in printed
    assert final(summary.directory)["optimizer"]["param_groups"][0]["weight_decay"] == 0.3


@pytest.mark.parametrize("override", ["model.decoder_width=8", "model.aux_layer=null", "threshold.queue_length=7"])
def test_a_checkpoint_that_does_not_fit_is_one_line(
    override: str, straight: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config(override, "run.name=other")
    path = str(straight / "checkpoints" / "00000004.pt")
    with pytest.raises(UserError, match="does not fit this configuration") as caught:
        train(config, resume=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_end(
    number: signal.Signals,
    straight: Path,
    make_config: Callable[..., Config],
    tmp_path: Path,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The signal comes in the middle of the fourth iteration, which is finished."""
    config = make_config("run.name=stopped")
    folder = RunFolder.of(config)
    file = tmp_path / "stopped.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    step, before = FusedEngine.step, signal.getsignal(number)

    def interrupted_step(engine: FusedEngine, batch: Batch) -> dict[str, Tensor]:
        if engine.iteration == 3:
            os.kill(os.getpid(), number)
        return step(engine, batch)

    with monkeypatch.context() as patched:
        patched.setattr(FusedEngine, "step", interrupted_step)
        assert main([str(file)]) == 0

    assert f"stopped by a signal at iteration 4; saved {folder.checkpoint(4)}" in capsys.readouterr().out
    assert checkpoint.latest(folder) == folder.checkpoint(4)
    assert not folder.results.exists()
    assert signal.getsignal(number) is before

    assert main([str(file), "--resume", "auto"]) == 0
    assert same(final(folder.path), final(straight))
    assert log(folder.path) == log(straight)
    assert folder.results.exists()
