"""A process that may open few files, or a disk that is full: one line, status 2, what was saved is whole."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults.killing import Study

from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.evaluation.networks import load
from cosa_fast.run import training
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.log import RunLog
from cosa_fast.train import main

NO_SPACE = Path("/dev/full")


def error_line(output: str) -> str:
    """The only line about an error."""
    assert "Traceback" not in output, output
    assert "Exception ignored" not in output, output
    lines = [line for line in output.splitlines() if "Error" in line or line.startswith("error:")]
    assert len(lines) == 1, output
    return lines[0]


@pytest.mark.parametrize("files", [12, 40])
def test_too_few_open_files_for_the_workers(files: int, study: Study) -> None:
    name = f"files{files}"
    ended = study.start(name, 4, files=files)
    assert ended.statuses == [2]
    line = error_line(ended.output)
    if files == 40:
        assert line.startswith("error: data.workers = 4 may need ")
        assert line.endswith(" and 40 are allowed; set data.workers lower, or raise the limit (ulimit -n)")
        assert study.start(name, 0, files=files).statuses == [0]
        assert study.difference(name) is None


@pytest.fixture
def command(
    make_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """command(*options): (exit status, stderr) of a short run's command line."""
    torch.set_num_threads(1)
    monkeypatch.setattr(training, "step_flops", lambda *_, **__: 1)
    config = make_config("optim.iterations=3", "run.checkpoint_every=1", "eval.every=2", "eval.limit=1")
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train", str(file), *options])
        return run_cli(main), capsys.readouterr().err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "tiny")


def partial(name: str) -> str:
    place = Path(name)
    return str(place.with_name(f".{place.name}.{os.getpid()}.partial"))


@pytest.mark.parametrize(
    ("place", "saved"),
    [
        ("manifest.json", []),
        ("log.jsonl", [1]),
        ("checkpoints/00000002.pt", [1, 2]),  # saved on the way out: by then there is room
        ("checkpoints/best.pt", [1, 2]),
        ("checkpoints/00000003.pt", [1, 2, 3]),
        ("results.json", [1, 2, 3]),
    ],
)
def test_a_full_disk(
    place: str,
    saved: list[int],
    command: Callable[..., tuple[int, str]],
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is full for this file, as it is written; later there is room."""
    full = folder.path / (place if place == "log.jsonl" else partial(place))
    write = training.manifest.write

    def write_manifest(*arguments: Any) -> None:
        full.parent.mkdir(exist_ok=True)
        full.symlink_to(NO_SPACE)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training.manifest, "write", write_manifest)
        status, errors = command()
    assert status == 2
    line = error_line(errors)
    assert Path(place).name in line
    assert "No space left on device" in line
    assert [load(path)["iteration"] for path in folder.numbered()] == saved

    full.unlink(missing_ok=True)
    assert command("--resume", "auto") == (0, "")
    assert load(folder.numbered()[-1])["iteration"] == 3


@pytest.fixture
def _unlimited_afterwards() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("_unlimited_afterwards")
def test_a_full_disk_for_tensorboard(
    command: Callable[..., tuple[int, str]], folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer is a thread."""
    record = RunLog.record

    def limited(log: RunLog, iteration: int, *arguments: Any, **named: Any) -> None:
        if iteration == 3:
            (events,) = folder.tensorboard.iterdir()
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + 10, most))
        record(log, iteration, *arguments, **named)

    monkeypatch.setattr(RunLog, "record", limited)
    status, errors = command()
    assert status == 2
    line = error_line(errors)
    assert "log.jsonl and tensorboard/: cannot be written (File too large)" in line
    assert [load(path)["iteration"] for path in folder.numbered()] == [1, 2]


def test_a_full_disk_for_what_is_printed(
    command: Callable[..., tuple[int, str]], folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, NO_SPACE.open("w") as full:
        patch.setattr(sys, "stdout", full)
        status, errors = command()
    assert status == 2
    assert "No space left on device" in error_line(errors)
    assert not folder.kept()


@pytest.mark.parametrize(
    ("place", "folder_there"),
    [("config.yaml", True), ("manifest.json", True), ("tensorboard", False)],
)
def test_a_place_of_the_wrong_kind(
    place: str,
    folder_there: bool,
    command: Callable[..., tuple[int, str]],
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder where a run writes a file, or the other way round."""
    status, errors = command("optim.iterations=2", "optim.cotrain_after=2")
    assert (status, errors) == (0, "")
    obstacle = folder.path / place
    if obstacle.is_dir():
        obstacle.rename(folder.path / "elsewhere")
    else:
        obstacle.unlink(missing_ok=True)
    if folder_there:
        (obstacle / "mine").mkdir(parents=True)
    else:
        obstacle.touch()
    status, errors = command("--resume", "auto")
    assert status == 2
    assert place in error_line(errors)
    assert obstacle.exists()
