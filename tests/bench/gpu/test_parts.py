"""Parts of the GPU check: their limits and order, and what is left when one fails, hangs or is killed."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import kernels, throughput
from bench.gpu import check, forks, machine, parts, summary, tests
from bench.gpu.summary import Report, against, count_figures

ROOT = Path(__file__).resolve().parents[3]


def test_the_parts_are_in_the_order_of_their_worth_and_fit_into_nine_minutes(tmp_path: Path) -> None:
    for todo in (parts.first(tmp_path, False), parts.more(tmp_path, False)):
        assert sum(part.limit for part in todo) <= parts.TOTAL < 9 * 60
        for part in todo:
            assert callable(importlib.import_module(part.module).main)
    names = [part.name for part in parts.first(tmp_path, False)]
    assert names == ["correctness", "steps", "losses", "kernels", "baseline", "ablations", "training"]


def test_every_budget_ends_before_its_limit(tmp_path: Path) -> None:
    todo = parts.first(tmp_path, False) + parts.more(tmp_path, False)
    for part in todo:
        if part.module == "bench.throughput":
            asked: Any = throughput.parse(part.arguments)
        elif part.module == "bench.kernels":
            asked = kernels.parse(part.arguments)
        else:
            continue
        assert asked.budget <= part.limit - 15
        assert asked.out == tmp_path / f"{part.name}.json"
    (steps,) = (throughput.parse(part.arguments) for part in todo if part.name == "steps")
    assert steps.batch_sizes == [16, 4]


def test_a_part_ends_with_its_status(tmp_path: Path) -> None:
    def ended(action: Any, limit: float = 30.0) -> int:
        return forks.run(action, tmp_path / "log", limit, lambda: None)

    assert ended(lambda: None) == 0
    assert ended(lambda: 3) == 3
    assert ended(lambda: sys.exit(4)) == 4
    assert ended(lambda: [][0]) == 1
    assert "IndexError" in (tmp_path / "log").read_text()
    assert ended(lambda: os.kill(os.getpid(), signal.SIGKILL)) == 128 + 9
    start = time.monotonic()
    assert ended(lambda: time.sleep(60), limit=0.2) == forks.TIMED_OUT
    assert time.monotonic() - start < 20


def test_a_part_that_will_not_end_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "GRACE", 0.2)

    def stubborn() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(600)

    assert forks.run(stubborn, tmp_path / "log", 1.0, lambda: None) == forks.TIMED_OUT
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("what the part started is still there")


FAKE = """
import json, pathlib, time
def main(arguments):
    path, mode = pathlib.Path(arguments[0]), arguments[1]
    if mode != "nothing":
        path.write_text(json.dumps({"rows": [{"ms": 1.0}]}))
    if mode == "hangs":
        time.sleep(600)
    if mode == "dies":
        raise RuntimeError("no kernel image")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module whose `main` writes a figure and then ends as its second argument says."""
    (tmp_path / "fake_part.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "fake_part"


def test_a_part_that_fails_does_not_take_the_others_along(
    fake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    folder, out = tmp_path / "work", tmp_path / "out"
    folder.mkdir()
    modes = {"first": "well", "broken": "dies", "stuck": "hangs", "empty": "nothing", "last": "well"}
    todo = [
        parts.Part(name, fake, [str(folder / f"{name}.json"), mode], 1.0 if mode == "hangs" else 30.0)
        for name, mode in modes.items()
    ]
    todo.append(parts.Part("lacking", fake, [], 30.0, ("no_such_module",)))
    # The parts' clock is their own: a limit below five seconds is not worth a start.
    monkeypatch.setattr(check, "LEAST", 0.5)
    assert check._measure(todo, folder, out, None, time.monotonic() + 60) == 1
    found = json.loads((out / "summary.json").read_text())
    statuses = {part["part"]: (part.get("status"), part.get("figures")) for part in found["parts"]}
    assert statuses == {
        "first": (0, 1), "broken": (1, 1), "stuck": (124, 1), "empty": (0, 0), "last": (0, 1), "lacking": (None, None),
    }  # fmt: skip
    assert found["results"]["stuck"] == {"rows": [{"ms": 1.0}]}
    printed = capsys.readouterr().out
    assert "RuntimeError: no kernel image" in printed
    assert "lacking: left out: not installed: no_such_module" in printed


def test_no_part_starts_when_the_time_is_over(fake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    part = parts.Part("late", fake, [str(tmp_path / "late.json"), "well"], 30.0)
    assert check._measure([part], tmp_path, tmp_path / "out", None, time.monotonic()) == 1
    assert not (tmp_path / "late.json").exists()


def test_a_figure_is_in_the_summary_while_its_part_still_runs(tmp_path: Path) -> None:
    report = Report(tmp_path, tmp_path / "out", None)
    (tmp_path / "steps.json").write_text('{"results": [{"providers": {"ours": {"ms": 80.0}}}]}')
    report.refresh()
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["results"]["steps"]["results"][0]["providers"]["ours"]["ms"] == 80.0
    assert found["parts"] == []


def test_figures_are_counted_wherever_they_stand() -> None:
    assert count_figures(None) == 0
    assert count_figures({"rows": [{"ms": 1.0}, {"ms": None, "error": "no"}], "deep": {"er": {"difference": 0.0}}}) == 2


def test_measured_stands_beside_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"gpu": "H100", "backbone": "ViT-B/16", "batch_size": 16, "ms": 90.0, "images_per_second": 178.0,
           "phases_ms": {"AN": 44.0}}  # fmt: skip
    (tmp_path / "predicted.json").write_text(json.dumps({"rows": [row, {**row, "gpu": "H200", "ms": 70.0}]}))
    monkeypatch.setattr(summary, "STEPS", tmp_path / "predicted.json")
    machine_ = {"device": "NVIDIA H100 80GB HBM3"}
    ours = {"ms": 80.0, "images_per_second": 200.0, "peak_mib": 7000.0}
    result = {
        "backbone": "vit_base_patch16_224.orig_in21k_ft_in1k", "batch_size": 16, "crop": 448, "classes": 20,
        "providers": {"ours": ours, "baseline": {"error": "out of memory"}}, "phases_ms": {"AN": 40.0},
    }  # fmt: skip
    results = {"steps": {"machine": machine_, "results": [result]}}
    rows = {row["what"]: row for row in against(results)}
    assert rows["peak memory"]["measured"] == 7000.0
    assert rows["peak memory"]["predicted"] > 1000
    assert rows["step"]["size"] == "ViT-B/16 B=16"
    assert rows["step"]["ratio"] == pytest.approx(80.0 / 90.0)
    assert rows["phase AN (not captured)"]["measured"] == 40.0
    text = summary.table({"parts": [], "results": results, "against_prediction": list(rows.values())})
    assert "steps, ViT-B/16 B=16 C=20, baseline: out of memory" in text
    failed = {"steps": {"machine": machine_, "results": [{**result, "providers": {"ours": {"error": "no"}}}]}}
    assert against(failed) == []


def test_wrong_kernels_are_shouted(tmp_path: Path) -> None:
    row = {"operator": "fuse_cams", "variant": "", "result": "result 0", "good": False, "difference": 0.5}
    text = summary.table({"parts": [], "results": {"correctness": {"rows": [row]}}, "against_prediction": []})
    assert "WRONG: fuse_cams  result 0: 5.00e-01" in text


def test_every_file_of_gpu_tests_is_found(request: pytest.FixtureRequest) -> None:
    # Of the tests collected beside this one: all of them when the whole suite runs.
    marked = {item.path for item in request.session.items if item.get_closest_marker("gpu")}
    assert marked <= set(tests.files())
    assert len(tests.files()) > 5


def test_absent_modules_are_named() -> None:
    assert machine.absent(["json", "no_such_module", "no_such.module"]) == ["no_such_module", "no_such.module"]
    assert machine.first_line(()) == "not installed: nothing that a part needs"
