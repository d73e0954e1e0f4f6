"""What a run says before its first iteration, and how it tells evaluations of a part from those of the whole."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.run import evaluating
from cosa_fast.run.data import open_datasets
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.log import read_log
from cosa_fast.run.opening import opening
from cosa_fast.run.training import train

MakeConfig = Callable[..., Config]
WORDS = ["data", "network", "device", "pipeline", "recipe", "folder"]


def test_a_run_says_what_it_will_do_before_it_does_it(
    make_config: MakeConfig, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(make_config("optim.iterations=1", "optim.cotrain_after=0")).folder
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("iteration 1/1"))
    start = next(number for number, line in enumerate(lines) if line.startswith("data  "))
    assert start < first
    block = [line for line in lines[start:first] if not line.startswith(" ")]
    assert [line.split()[0] for line in block[: len(WORDS)]] == WORDS
    said = " ".join(" ".join(lines[start:first]).split())
    for part in (
        f"voc {data_root}: 8 images to train on",
        "labels from",
        "labels.json",
        "2 to evaluate (with masks)",
        "5 classes:",
        "vit_tiny_patch16_224, 0.1 M parameters; random weights",
        "cpu (1 thread), fp32, fused engine, plain PyTorch operators, sdpa attention",
        "torch (data.pipeline = torch), no worker processes",
        "1 iteration of 2 images (0.25 passes), crop 64, co-training after 0",
        str(folder.path),
    ):
        assert part in said
    assert all(len(line) <= 100 or " " not in line.strip()[10:] for line in lines[start:first])


def test_manifest_block_and_log_say_how_the_step_computes(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a capture that fails on the way, at the iteration where it did."""
    step = FusedEngine.step

    def fails(engine: FusedEngine, batch: Batch) -> dict[str, Tensor]:
        if engine.iteration == 1:
            engine.not_captured = "a step waits for the device"
        return step(engine, batch)

    monkeypatch.setattr(FusedEngine, "step", fails)
    overrides = ("optim.iterations=3", "optim.cotrain_after=0", "run.log_every=10", "teacher.attention=packed")
    folder = train(make_config(*overrides)).folder
    assert "sdpa (ON) and packed (AN)" in " ".join(capsys.readouterr().out.split())
    manifest = json.loads(folder.manifest.read_text(encoding="utf-8"))
    assert (manifest["attention"], manifest["not_captured"]) == ({"on": "sdpa", "an": "packed"}, None)
    (capture,) = [record for record in read_log(folder.log) if record["kind"] == "capture"]
    assert capture == {"kind": "capture", "iteration": 2, "not_captured": "a step waits for the device"}


@pytest.mark.parametrize("reason", [None, "run.capture=off"])
def test_the_block_says_whether_steps_of_a_gpu_are_captured(
    reason: str | None, make_config: MakeConfig, make_engine: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine.device, engine.not_captured = torch.device("cuda"), reason
    for name, value in {"cuda.get_device_name": lambda _: "GPU", "empty": lambda *_, **__: None}.items():
        monkeypatch.setattr(f"torch.{name}", value)
    monkeypatch.setattr("cosa_fast.run.opening.use_triton", lambda *_: True)
    text = opening(engine, *open_datasets(make_config()), "torch", "why", RunFolder(Path("runs/tiny")))
    said = "CUDA graphs" if reason is None else f"no CUDA graphs ({reason})"
    assert f"compiled blocks, {said}, sdpa attention" in " ".join(text.split())


def test_a_resumed_run_says_whose_weights_it_goes_on_with(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("optim.iterations=1", "optim.cotrain_after=0")
    train(config, resume="auto")
    assert f"{RunFolder.of(config).path}: no checkpoint to resume, the run begins\n" in capsys.readouterr().out
    train(config, resume="auto")
    assert "no iteration is left (1 of 1): the last evaluation follows\n" in capsys.readouterr().out
    train(make_config("optim.iterations=2", "optim.cotrain_after=0"), resume="auto")
    assert "; weights of the checkpoint of iteration 1\n" in capsys.readouterr().out


def test_lines_fit_a_terminal_whatever_stands_in_them(make_config: MakeConfig, make_engine: Callable) -> None:
    engine = make_engine()
    training_set, validation_set = open_datasets(make_config())
    training_set.classes = tuple(f"class number {number}" for number in range(80))
    engine.on.master.origin = "4 of 4 tensors from weights.pth; " + "resampled pos_embed 1x197x48 to 1x65x48; " * 6
    text = opening(engine, training_set, validation_set, "torch", "why " * 60, RunFolder(Path("runs/tiny")))
    assert max(map(len, text.splitlines())) <= 100
    assert "and 72 more" in " ".join(text.split())


def test_a_schedule_that_may_be_a_slip_is_noted(make_config: MakeConfig, make_engine: Callable) -> None:
    def notes(*overrides: str) -> list[str]:
        engine = make_engine(*overrides)
        text = opening(engine, *open_datasets(engine.config), "torch", "chosen", RunFolder(Path("runs/tiny")))
        return [line for line in text.splitlines() if line.startswith("note:")]

    assert notes("eval.every=6", "optim.warmup=5") == []
    said = notes("eval.every=7", "optim.warmup=6", "optim.cotrain_after=6")
    assert len(said) == 3
    for key, note in zip(("optim.warmup = 6", "optim.cotrain_after", "eval.every = 7"), said, strict=True):
        assert key in note


def test_eval_limit_holds_for_the_last_evaluation_too_and_is_said(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(make_config("optim.iterations=2", "optim.cotrain_after=0", "eval.every=1", "eval.limit=1"))
    assert {result.images for result in summary.results.values()} == {1}
    printed = capsys.readouterr().out
    assert "1 of 2 (eval.limit) to evaluate" in " ".join(printed.split())
    said = re.findall(r"^iteration (\d) (ON|AN), 1 of 2 images \(eval\.limit\): seg label-free", printed, re.MULTILINE)
    assert said == [("1", "ON"), ("1", "AN"), ("2", "ON"), ("2", "AN")]
    assert json.loads(summary.folder.results.read_text())["iteration"] == 2


def test_a_terminal_shows_a_bar_for_every_evaluation(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(tqdm):
        def __init__(self, **options: object) -> None:
            super().__init__(**(options | {"disable": False}))  # as on a terminal
            bars.append((self.desc, self))

        def close(self) -> None:
            self.seen = (self.n, self.total)
            super().close()

    monkeypatch.setattr(evaluating, "tqdm", Bar)
    train(make_config("optim.iterations=1", "optim.cotrain_after=0"))
    assert [(name, bar.seen) for name, bar in bars] == [("evaluating ON and AN", (2, 2))]


def test_other_ranks_show_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with evaluating.evaluation_bar("on", shown=False) as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""
