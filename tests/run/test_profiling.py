"""--profile leaves a trace and a table, and the run as it would have been."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import load
from cosa_fast.run.training import train
from cosa_fast.train import main


def test_trace_and_table_of_a_run_that_goes_on_unchanged(
    make_config: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    same: Callable[[Any, Any], bool],
) -> None:
    """Of 7 iterations 3 are skipped and one warms the profiler up: the 5th and 6th are in it."""
    short = ("optim.iterations=7", "optim.cotrain_after=5", "teacher.scales=[1.0]")
    config = make_config(*short, "run.name=profiled")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    assert main([str(tmp_path / "config.yaml"), "--profile", "2"]) == 0
    directory = tmp_path / "runs" / "profiled"

    events = json.loads((directory / "profile" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#4", "ProfilerStep#5"}
    table = (directory / "profile" / "top.txt").read_text(encoding="utf-8")
    assert "Self CPU" in table
    assert sum(line.startswith(" ") and "aten::" in line for line in table.splitlines()) > 10
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile of")]
    assert len(lines) == 1
    assert "profile of 2 iterations" in lines[0]
    assert str(directory / "profile" / "trace.json") in lines[0]

    plain = train(make_config(*short)).directory
    assert not (plain / "profile").exists()
    final = [load(each / "checkpoints" / "00000007.pt")["student"] for each in (directory, plain)]
    assert same(*final)


def test_a_run_that_ends_first_leaves_what_there_is(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = train(make_config("optim.iterations=5", "optim.cotrain_after=5"), profile=9).directory
    assert "profile of 1 iteration:" in capsys.readouterr().out
    assert (directory / "profile" / "trace.json").exists()


def test_a_run_too_short_for_a_profile_says_so(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = train(make_config("optim.iterations=4", "optim.cotrain_after=4"), profile=1).directory
    assert "no profile: " in capsys.readouterr().out
    assert not (directory / "profile").exists()


@pytest.mark.parametrize("count", ["0", "-1"])
def test_nothing_to_profile_is_one_line_and_leaves_an_existing_run_alone(
    count: str, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    file = Path(config.run.output) / config.run.name / "checkpoints" / "best.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"precious")
    with pytest.raises(UserError, match=f"--profile {count}: "):
        train(config, overwrite=True, profile=int(count))
    assert file.read_bytes() == b"precious"

    written = file.parent / "config.yaml"
    written.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["train", str(written), f"--profile={count}"])
    assert run_cli(main) == 2
    assert capsys.readouterr().err.count("\n") == 1
