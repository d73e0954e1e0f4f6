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
from cosa_fast.evaluation.evaluator import AnyResult
from cosa_fast.evaluation.networks import load
from cosa_fast.run import checkpoint
from cosa_fast.run.endings import Endings
from cosa_fast.run.evaluating import LoopEvaluation
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
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"does not fit this configuration \({key}: \S+ -> ") as caught:
        train(config, resume=path)
    assert "\n" not in str(caught.value)


def test_an_evaluation_that_was_cut_short_is_made_up(
    make_config: Callable[..., Config], same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ended it finds the state on the disk; log, best score and best.pt become those of an undisturbed run."""
    alone = train(make_config("eval.every=2", "run.name=alone"))
    config = make_config("eval.every=2")
    folder = RunFolder.of(config)
    report, evaluated = LoopEvaluation._report, set()

    def cut_short(evaluation: LoopEvaluation, name: str, result: AnyResult) -> None:
        """The first evaluation at each iteration, when ON's record is written and AN's is not."""
        report(evaluation, name, result)
        if evaluation._engine.iteration not in evaluated:
            evaluated.add(evaluation._engine.iteration)
            raise KeyboardInterrupt

    monkeypatch.setattr(LoopEvaluation, "_report", cut_short)
    for iteration in (2, 4, 6):
        with pytest.raises(KeyboardInterrupt):
            train(config, resume="auto")
        assert checkpoint.latest(folder) == folder.checkpoint(iteration)
        assert [line["kind"] for line in log(folder.path)][-2:] == ["train", "eval_student"]

    train(config, resume="auto")
    assert log(folder.path) == log(alone.directory)
    assert same(final(folder.path), final(alone.directory))
    best, expected = (load(each.best) for each in (folder, alone.folder))
    assert same({**best, "config": None}, {**expected, "config": None})


def test_a_best_checkpoint_that_was_not_written_is_made_up(
    make_config: Callable[..., Config], same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises what killed a worker anywhere, and the state is saved then."""
    alone = train(make_config("eval.every=100", "run.name=alone"))
    config = make_config("eval.every=100")
    folder, save_best, failed = RunFolder.of(config), Endings.save_best, []

    def fails_once(endings: Endings, chosen: dict[str, Any]) -> None:
        if not failed:
            failed.append(chosen)
            raise UserError("a data.workers process was killed")
        save_best(endings, chosen)

    monkeypatch.setattr(Endings, "save_best", fails_once)
    with pytest.raises(UserError, match="was killed"):
        train(config)
    train(config, resume="auto")
    best, expected = (load(each.best) for each in (folder, alone.folder))
    assert same({**best, "config": None}, {**expected, "config": None})


def test_the_log_goes_on_where_the_checkpoint_is(straight: Path, make_config: Callable[..., Config]) -> None:
    """Records from after it go, and the half of one that a killed process wrote."""
    config = make_config()
    folder = RunFolder.of(config)
    interrupted(straight, folder.path, 4)
    whole = (straight / "log.jsonl").read_bytes()
    folder.log.write_bytes(whole + b'{"kind": "train", "iterat')
    train(config, resume="auto")
    assert log(folder.path) == log(straight)
    assert folder.log.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:4]))


def test_half_written_files_of_killed_processes_go(straight: Path, make_config: Callable[..., Config]) -> None:
    config = make_config()
    folder = RunFolder.of(config)
    interrupted(straight, folder.path, 5)
    (folder.checkpoints / ".00000006.pt.77.partial").write_bytes(b"half")
    train(config, resume="auto")
    assert list(folder.path.rglob(".*")) == []


def test_what_is_not_as_it_was_is_said_in_one_line(
    straight: Path, make_config: Callable[..., Config], data_root: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = tmp_path / "set"
    shutil.copytree(data_root, root)

    def said(iteration: int, *overrides: str) -> str:
        config = make_config(f"data.root={root}", *overrides)
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        interrupted(straight, RunFolder.of(config).path, iteration)
        capsys.readouterr()
        assert train(config, resume="auto").iteration == 6
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming ")]
        assert len(lines) == 1
        return lines[0]

    assert "changed" not in said(6, "run.log_every=2")  # but for data.root
    other = said(5, "run.seed=3", "run.engine=plain", "run.precision=bf16", "optim.lr=1e-5")
    for text in ("run.seed: 0 -> 3", "run.engine: fused -> plain", "run.precision: auto -> bf16", "optim.lr: 0.001"):
        assert text in other

    image = root / "JPEGImages" / "train_00003.jpg"
    image.write_bytes(image.read_bytes()[:-2] + b"x" + image.read_bytes()[-2:])
    assert said(6).endswith("; the training images have changed)")
    labels = json.loads((root / "labels.json").read_text(encoding="utf-8"))
    labels["train_00001"] = labels["train_00000"]
    (root / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    assert said(6).endswith("; the training labels have changed; the training images have changed)")
    names = root / "ImageSets" / "Segmentation" / "train.txt"
    names.write_text("\n".join(names.read_text().splitlines()[1:]), encoding="utf-8")
    assert "the training images' names have changed" in said(6)


def test_another_run_s_checkpoint_does_not_go_into_a_folder_that_holds_a_run(
    straight: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config()
    folder = RunFolder.of(config)
    interrupted(straight, folder.path, 2)
    with pytest.raises(UserError, match=r"holds a run already \(checkpoints/00000001\.pt\)"):
        train(config, resume=str(RunFolder(straight).checkpoint(5)))
    assert folder.numbered() == [folder.checkpoint(1), folder.checkpoint(2)]
    assert train(config, resume=str(RunFolder(straight).checkpoint(5)), overwrite=True).iteration == 6
    assert folder.numbered() == [folder.checkpoint(6)]


def test_going_back_to_an_older_checkpoint_leaves_the_newer_ones_aside(
    straight: Path, make_config: Callable[..., Config], same: Same, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("optim.iterations=5")
    folder = RunFolder.of(config)
    interrupted(straight, folder.path, 6)
    older = str(folder.checkpoint(4))
    with pytest.raises(UserError, match="it is of the very run that would be replaced"):
        train(config, resume=older, overwrite=True)
    train(config, resume=older)
    assert checkpoint.latest(folder) == folder.checkpoint(5)
    assert (folder.checkpoints / "00000006.pt.left").exists()
    assert "00000006.pt: newer than 00000004.pt; renamed to 00000006.pt.left" in capsys.readouterr().out


def test_results_without_a_checkpoint_are_not_begun_over(make_config: Callable[..., Config]) -> None:
    config = make_config()
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True)
    folder.results.write_text("{}")
    with pytest.raises(UserError, match=r"holds a run already \(results\.json\)"):
        train(config, resume="auto")
    assert folder.results.read_text() == "{}"


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
