"""bench/ablate.py: runs are trained, kept, resumed and averaged, whatever happens to them on the way."""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bench_support import assert_chart

from bench import ablate
from bench.runs import ablation
from bench.runs.matrix import Matrix, load_matrix
from cosa_fast.config.parsing import config_to_dict
from cosa_fast.errors import UserError
from cosa_fast.run.training import train

# Stands in for cosa_fast.train: leaves in a run's folder what a training of six iterations does, in no time. "slow"
# waits for a signal after its second iteration unless it is resumed, "broken" fails.
TRAINER = """
import json, os, pathlib, shutil, signal, sys, time
here = pathlib.Path(__file__).parent
settings = dict(item.split("=", 1) for item in sys.argv[2:] if "=" in item)
name = settings["run.name"]
folder = pathlib.Path(settings["run.output"]) / name
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
if name.startswith("killed"):
    print("iteration 1/6  loss 2.0", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if name.startswith("broken"):
    print("loading\\nerror: no weights; give others")
    sys.exit(2)
checkpoints = folder / "checkpoints"
checkpoints.mkdir(parents=True, exist_ok=True)
shutil.copy(here / f"{name}.yaml", folder / "config.yaml")
(folder / "manifest.json").write_text(json.dumps({"commit": "abc", "machine": "m", "seed": 0}))
start = max([int(path.stem) for path in checkpoints.iterdir()], default=0) if "--resume" in sys.argv else 0
with (folder / "log.jsonl").open("a") as log:
    for iteration in range(start + 1, 7):
        log.write(json.dumps({"kind": "train", "iteration": iteration, "seconds_per_iteration": 60.0}) + "\\n")
        (checkpoints / f"{iteration:08d}.pt").touch()
        log.flush()
        while name.startswith("slow") and start == 0 and iteration == 2 and not told:
            time.sleep(0.01)
        if told:
            sys.exit(0)
scores = {"seg_label_free": 10.0 + int(settings["run.seed"]) + 5 * ("loss.csc=0" in sys.argv), "cam_best": 50.0}
(folder / "results.json").write_text(json.dumps({"iteration": 6, "student": scores, "teacher": scores}))
"""

LoadMatrix = Callable[..., Matrix]


@pytest.fixture
def matrix_file(tiny_values: dict[str, Any], tmp_path: Path) -> Path:
    """Two rows, two seeds, of the tiny configuration."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_values))
    path = tmp_path / "pair.yaml"
    rows = {"paper": [], "csc_off": ["loss.csc=0"]}
    values = {"base": "tiny.yaml", "overrides": ["run.checkpoint_every=2"], "seeds": [0, 1], "runs": rows}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def stand_in(matrix_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadMatrix:
    """stand_in("row", ...): the matrix of these rows, which the stand-in trains."""
    script = tmp_path / "trainer" / "train.py"
    script.parent.mkdir()
    script.write_text(TRAINER)
    monkeypatch.setattr(ablation, "TRAIN", (str(script),))
    monkeypatch.setattr(ablation, "POLL_SECONDS", 0.02)

    def make(*rows: str) -> Matrix:
        values = yaml.safe_load(matrix_file.read_text())
        values["runs"] = {row: values["runs"].get(row, []) for row in rows}
        matrix_file.write_text(yaml.safe_dump(values, sort_keys=False))
        matrix = load_matrix(str(matrix_file), str(tmp_path / "out"))
        for run in matrix.runs:
            (script.parent / f"{run.config.run.name}.yaml").write_text(yaml.safe_dump(config_to_dict(run.config)))
        return matrix

    return make


def ablate_in(tmp_path: Path, *arguments: str) -> int:
    return ablate.main([str(tmp_path / "pair.yaml"), "--output", str(tmp_path / "out"), *arguments])


def test_real_runs_are_kept_resumed_and_begun(
    matrix_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four runs two are finished, one was killed after its fourth iteration, one has not begun."""
    torch.set_num_threads(1)
    runs = {run.config.run.name: run for run in load_matrix(str(matrix_file), str(tmp_path / "out")).runs}
    for name in ("paper_0", "csc_off_0", "paper_1"):
        train(runs[name].config)
    killed = runs["paper_1"].folder
    uninterrupted = json.loads(killed.results.read_text())
    killed.results.unlink()
    killed.checkpoint(6).unlink()
    log = killed.log.read_text().splitlines(keepends=True)
    killed.log.write_text("".join(line for line in log if json.loads(line)["iteration"] <= 5))
    kept = runs["paper_0"].folder.results.stat().st_mtime_ns
    capsys.readouterr()

    assert ablate_in(tmp_path, "--dry-run") == 0
    plan = capsys.readouterr().out.splitlines()
    assert plan[0] == "paper, seed 0: finished"
    assert plan[2].startswith("paper, seed 1: resume at 4: ")
    assert plan[2].endswith(f"run.output={tmp_path / 'out'} run.name=paper_1 run.seed=1 --resume auto")
    assert plan[3].startswith(f"csc_off, seed 1: new: {sys.executable} -m cosa_fast.train {tmp_path / 'tiny.yaml'} ")
    assert plan[3].endswith(f"loss.csc=0 run.output={tmp_path / 'out'} run.name=csc_off_1 run.seed=1 --overwrite")
    assert not runs["csc_off_1"].folder.path.exists()

    assert ablate_in(tmp_path, "--jobs", "2") == 0
    printed = capsys.readouterr().out
    assert "[1/4] paper, seed 0: kept: label-free " in printed
    assert "[4/4] csc_off, seed 1: label-free " in printed
    assert runs["paper_0"].folder.results.stat().st_mtime_ns == kept
    assert json.loads(killed.results.read_text()) == uninterrupted

    found = json.loads((tmp_path / "out" / "pair.json").read_text(encoding="utf-8"))
    row = found["runs"]["paper"]
    scores = [row["seeds"][seed]["an"]["seg_label_aware"] for seed in ("0", "1")]
    assert row["an"]["mean"]["seg_label_aware"]["mean"] == pytest.approx(sum(scores) / 2)
    assert (row["seeds"]["1"]["resumed"], "resumed" in row["seeds"]["0"]) == (1, False)
    assert found["runs"]["csc_off"]["an"]["difference"]["cam_best"]["n"] == 2
    assert found["missing"] == []
    assert str(tmp_path) not in json.dumps(found)
    text = (tmp_path / "out" / "pair.txt").read_text(encoding="utf-8")
    assert text in printed
    assert (tmp_path / "out" / "pair.md").read_text(encoding="utf-8").count("\n| csc_off") == 4
    assert max(map(len, text.splitlines())) <= 100
    assert (tmp_path / "out" / "pair.md").read_text(encoding="utf-8").count("| csc_off |") == 4
    assert_chart(tmp_path / "out" / "pair.png")


def test_a_signal_lets_the_runs_save_and_the_same_command_goes_on(
    stand_in: LoadMatrix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = stand_in("paper", "slow")
    at_work = [run for run in matrix.runs if run.row == "slow"]

    def stop() -> None:
        while not at_work[0].folder.checkpoint(2).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop)
    watcher.start()
    before = signal.getsignal(signal.SIGTERM)
    assert ablate_in(tmp_path) == 130
    watcher.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "the same command goes on" in capsys.readouterr().err
    assert [ablation.state(run) for run in matrix.runs] == ["finished", "resume at 2", "new", "new"]
    # What was finished by then has its tables already.
    assert json.loads((tmp_path / "out" / "pair.json").read_text())["missing"] == [str(run) for run in matrix.runs[1:]]

    at_work[1].folder.checkpoint(1).parent.mkdir(parents=True)  # the other one is not to wait for a signal
    at_work[1].folder.checkpoint(1).touch()
    at_work[1].folder.config.write_text((tmp_path / "trainer" / "slow_1.yaml").read_text())
    assert ablate_in(tmp_path) == 0
    assert [ablation.state(run) for run in matrix.runs] == ["finished"] * 4
    logged = [json.loads(line)["iteration"] for line in at_work[0].folder.log.read_text().splitlines()]
    assert logged == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out.count("kept: ") == 1


def test_a_run_that_fails_harms_no_other(
    stand_in: LoadMatrix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in("broken", "paper", "csc_off")
    assert ablate_in(tmp_path, "--jobs", "3") == 1
    captured = capsys.readouterr()
    output = tmp_path / "out" / "broken_1" / "output.txt"
    failure = f"broken, seed 1: failed (error: no weights; give others); see {output}"
    assert f"[4/6] {failure}" in captured.out
    assert captured.err.splitlines()[-1] == failure
    found = json.loads((tmp_path / "out" / "pair.json").read_text())
    assert found["missing"] == ["broken, seed 0", "broken, seed 1"]
    assert found["runs"]["csc_off"]["an"]["mean"]["seg_label_free"] == {"mean": 15.5, "std": 0.5**0.5, "n": 2}
    assert found["runs"]["paper"]["seeds"]["0"]["minutes"] == 6.0


def test_a_run_that_was_killed_says_so(
    stand_in: LoadMatrix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in("killed")
    assert ablate_in(tmp_path) == 1
    assert "killed, seed 1: failed (killed by signal 9, perhaps for want of memory); see " in capsys.readouterr().err


def test_a_signal_that_comes_while_a_run_is_started_stops_that_too(
    stand_in: LoadMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that the ablation did not know of would go on, and keep the folder from the same command."""
    (first, second) = stand_in("slow").runs
    start = ablation._start

    def interrupted(*arguments: Any) -> Any:
        job = start(*arguments)
        while not first.folder.checkpoint(2).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        return job

    monkeypatch.setattr(ablation, "_start", interrupted)
    assert ablate_in(tmp_path) == 130
    with ablation._owned(tmp_path / "out"):
        assert (ablation.state(first), ablation.state(second)) == ("resume at 2", "new")


def test_a_folder_with_other_settings_is_refused(stand_in: LoadMatrix, tmp_path: Path) -> None:
    matrix = stand_in("paper", "csc_off")
    assert ablate_in(tmp_path) == 0
    assert ablate_in(tmp_path, "run.log_every=7", "data.workers=1") == 0
    with pytest.raises(UserError, match=r"paper_0: holds a run with other settings \(loss.s2c: 0.05 -> 0.5\); remove"):
        ablate_in(tmp_path, "loss.s2c=0.5")
    others = ", ".join(str(run.folder.path) for run in matrix.runs[1:])
    with pytest.raises(UserError, match=re.escape(f"another --output (refused as well: {others})")):
        ablate_in(tmp_path, "loss.s2c=0.5", "--dry-run")
    matrix.runs[0].folder.config.unlink()
    with pytest.raises(UserError, match=r"paper_0: holds a run without its config.yaml, whose settings may be others"):
        ablate_in(tmp_path, "loss.s2c=0.5")


def test_a_row_that_is_trained_anew_leaves_the_tables_at_once(stand_in: LoadMatrix, tmp_path: Path) -> None:
    matrix = stand_in("paper", "csc_off")
    assert ablate_in(tmp_path) == 0
    shutil.rmtree(matrix.runs[3].folder.path)
    missing: list[list[str]] = []
    assert ablation.train_all(matrix, 1, lambda: missing.append(ablation.gather(matrix)[2]["missing"])) == []
    assert missing == [["csc_off, seed 1"], []]


@pytest.mark.parametrize("left", ["", "[]", '{"iteration": 3}', '{"iteration": 6, "teacher": [1]}'])
def test_damaged_results_are_made_anew(left: str, stand_in: LoadMatrix, tmp_path: Path) -> None:
    run = stand_in("paper").runs[0]
    assert ablate_in(tmp_path) == 0
    run.folder.results.write_text(left)
    assert ablation.state(run) == "resume at 6"
    assert ablate_in(tmp_path) == 0
    assert ablation.state(run) == "finished"


def test_a_standalone_network_has_the_figures_of_one(stand_in: LoadMatrix, tmp_path: Path) -> None:
    matrix = stand_in("paper")
    settings = ["model.architecture=Segformer", "data.pseudo_labels=cpl", "optim.cotrain_after=6"]
    matrix = load_matrix(str(tmp_path / "pair.yaml"), str(tmp_path / "out"), overrides=settings)
    for run in matrix.runs:
        run.folder.path.mkdir(parents=True)
        run.folder.config.write_text(yaml.safe_dump(config_to_dict(run.config)))
        run.folder.manifest.write_text('{"commit": "abc"}')
        run.folder.log.write_text("")
        run.folder.results.write_text('{"iteration": 6, "teacher": {"seg_label_free": 40.0}}')
    assert ablate_in(tmp_path, *settings) == 0
    found = json.loads((tmp_path / "out" / "pair.json").read_text(encoding="utf-8"))["runs"]["paper"]
    assert found["an"]["mean"]["seg_label_free"]["mean"] == 40.0
    assert found["on"]["mean"] == {}


def test_a_run_that_outlives_its_ablation_keeps_the_folder(stand_in: LoadMatrix, tmp_path: Path) -> None:
    run = stand_in("slow").runs[0]
    with ablation._owned(tmp_path / "out") as lock:
        job = ablation._start(run, 0, {}, lock)
    with pytest.raises(UserError, match=r"out: another ablation, or a run that a killed one left behind, is at work"):
        ablate_in(tmp_path)
    while not run.folder.checkpoint(2).exists():
        time.sleep(0.01)
    job.process.terminate()
    assert job.process.wait() == 0
    job.output.close()
    with ablation._owned(tmp_path / "out"):
        assert ablation.state(run) == "resume at 2"


def test_classification_only_has_no_scores_of_the_segmentation(stand_in: LoadMatrix, tmp_path: Path) -> None:
    stand_in("paper")
    settings = ["optim.cotrain_after=6"]
    matrix = load_matrix(str(tmp_path / "pair.yaml"), str(tmp_path / "out"), overrides=settings)
    for run in matrix.runs:
        config = yaml.safe_dump(config_to_dict(run.config))
        (tmp_path / "trainer" / f"{run.config.run.name}.yaml").write_text(config)
    assert ablate_in(tmp_path, *settings) == 0
    assert ablation.figures(matrix.runs[0])["an"] == {"cam_best": 50.0}


def test_jobs_share_gpus_and_cores(stand_in: LoadMatrix, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = stand_in("paper").runs
    on_any = load_matrix("fig1.yaml").runs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    three = ablation.places(3, on_any)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in three] == ["3", "5", "3"]
    assert {place["OMP_NUM_THREADS"] for place in three} == {"2"}
    assert "CUDA_VISIBLE_DEVICES" not in ablation.places(1, on_cpu)[0]
    assert "OMP_NUM_THREADS" not in ablation.places(1, on_cpu)[0]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in ablation.places(2, on_any)] == ["0", "1"]


def test_the_bar_follows_a_log_that_is_being_written(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert ablation._logged_iteration(log) == 0
    log.write_text('{"kind": "train", "iteration": 10}\n{"kind": "train", "iteration": 20}\n{"itera')
    assert ablation._logged_iteration(log) == 20
    log.write_text(f'{"x" * 20_000}\n{{"kind": "train", "iteration": 30}}\n{{"iter{{"iteration": 40}}\n')
    assert ablation._logged_iteration(log) == 30
    log.write_text('{"ite')
    assert ablation._logged_iteration(log) == 0


def test_a_place_that_cannot_be_written_is_one_line(matrix_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"out: cannot be written .*give another --output"):
        ablate_in(tmp_path, "--out", str(tmp_path / "pair.json"))


def test_no_jobs_are_refused(matrix_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--jobs 0: must be at least 1"):
        ablate_in(tmp_path, "--jobs", "0")
