"""What the comparisons of finished runs make of their folders."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bench.runs import collect, curves
from bench.runs.reading import read_run
from cosa_fast.errors import UserError


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, scale: float = 1.0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        training = [
            {"kind": "train", "iteration": end, "loss": scale * loss, "seconds_per_iteration": 6.0, "lr": 1e-4}
            for end, loss in ((10, 4.0), (20, 2.0), (40, 1.0))
        ]
        evaluation = {"kind": "eval_student", "iteration": 40, "network": "student", "seg_label_free": 50 * scale}
        records = [*training, {**evaluation, "seg_label_free": 0.0}, evaluation]
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "manifest.json").write_text(json.dumps({"commit": name, "machine": "x86_64"}))
        config = {
            "data": {"root": "/disk/set"}, "model": {"weights": "/disk/w.safetensors"}, "optim": {"lr": 1e-4},
            "run": {"output": "/disk/runs"},
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return make


def test_a_collected_run_has_its_last_figures_and_no_paths_of_the_machine(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run, out = make_run("paper"), tmp_path / "new" / "out.json"
    assert collect.main([str(run), "-o", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))["paper"]
    assert found["results"]["student"]["seg_label_free"] == 50
    assert found["training_minutes"] == 4.0  # 40 iterations of 6 seconds
    assert found["curve"][-1] == {"iteration": 40, "loss": 1.0}
    config = found["config"]
    assert (config["data"]["root"], config["model"]["weights"], config["run"]["output"]) == (
        "set",
        "w.safetensors",
        "runs",
    )
    assert found["manifest"]["commit"] == "paper"


def test_curves_are_compared_between_pipelines_and_between_seeds(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run("demo_torch_0"), make_run("demo_dali_0", 1.1), make_run("demo_torch_1", 1.2)]
    out = tmp_path / "out.json"
    assert curves.main([*map(str, runs), "--window", "20", "-o", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["machine"] == {"machine": "x86_64"}
    compared = found["sets"]["demo"]
    # Windows that end at 20 and 40 have means 3 and 1, of the other pipeline 3.3 and 1.1: 0.3 of a mean of 2.1.
    assert compared["largest_difference_between"]["pipelines"] == {"loss": pytest.approx(0.3 / 2.1)}
    assert compared["largest_difference_between"]["seeds"] == {"loss": pytest.approx(0.6 / 2.2)}
    assert [(run["pipeline"], run["seed"], run["commit"]) for run in compared["runs"]] == [
        ("torch", "0", "demo_torch_0"), ("dali", "0", "demo_dali_0"), ("torch", "1", "demo_torch_1"),
    ]  # fmt: skip
    assert compared["runs"][1]["curve"]["20"] == {"loss": pytest.approx(3.3)}
    assert "demo between seeds: loss 27.3%" in capsys.readouterr().out


def test_a_folder_without_a_run_is_one_line(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/log\.jsonl: no such file"):
        collect.main([str(tmp_path / "nowhere"), "-o", str(tmp_path / "out.json")])
    with pytest.raises(UserError, match="demo: not named SET_PIPELINE_SEED"):
        curves.main([str(make_run("demo")), "-o", str(tmp_path / "out.json")])


def test_a_line_that_a_killed_run_left_unfinished_is_passed_over(make_run: Callable[..., Path]) -> None:
    """The run that went on appended to it. Steps done again count once: 25 to 40 at 6 seconds, 40 iterations in all."""
    run = make_run("resumed")
    again = {"kind": "train", "iteration": 25, "loss": 1.0, "seconds_per_iteration": 6.0}
    with (run / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "itera' + json.dumps(again) + "\n" + json.dumps(again) + "\n")
        log.write(json.dumps(again | {"iteration": 40}) + "\n1\n[]\n{}\n")
    found = read_run(run)
    assert [record["iteration"] for record in found.training] == [10, 20, 40, 25, 40]
    assert found.minutes == pytest.approx(4.0)
