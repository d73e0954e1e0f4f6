"""The kernel benchmark's times: every mode, failures, what a budget leaves out."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.operators import cases
from bench.operators.limits import PREDICTED_H200
from bench.operators.measured import Bench, Job, jobs, measure
from bench.operators.output import print_measured, write
from bench.operators.scene import Size
from bench.timing import CudaClock, HostClock

BENCH = Bench(torch.device("cpu"), HostClock(), PREDICTED_H200, budget_ms=1.0)


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    machine = dict.fromkeys(("gpu", "torch", "triton", "commit", "date"))
    return {"kind": "measured", "machine": machine, "limits": vars(PREDICTED_H200), "rows": rows}


def test_every_mode_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure(Job("perplexity", Size(batch=1, resolution=32), "eager"), BENCH)
    assert [row["mode"] for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert "error" not in row
        assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
        assert row["share"] == pytest.approx(row["limit_ms"] / row["ms"])
    print_measured(results(rows))
    printed = capsys.readouterr().out
    assert all(f"{row['ms']:.4g} | -" in printed for row in rows)


def test_a_failure_is_recorded_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(size: Any, scene: Any) -> None:
        raise RuntimeError("no kernel\nfor details")

    monkeypatch.setitem(cases.OPERATORS, "histogram", cases.Operator(broken, frozenset()))
    rows = [row for name in ("histogram", "fit_mixture") for row in measure(Job(name, Size(), "eager"), BENCH)]
    assert rows[0]["error"] == "RuntimeError: no kernel"
    assert rows[1]["ms"] > 0
    write(tmp_path / "rows.json", results(rows))
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"] == rows
    assert len((tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(rows)
    print_measured(results(rows))
    assert "error: histogram C=20 B=16 448 bf16 eager: RuntimeError: no kernel" in capsys.readouterr().out


def test_the_definition_is_compiled_only_where_that_can_end() -> None:
    (row,) = measure(Job("dense_energy", Size(), "compiled"), BENCH)
    assert row["error"].startswith("not tried: ")


def test_what_a_budget_cuts_off_is_the_least_wanted() -> None:
    every = list(jobs(["perplexity", "histogram"], ["compiled", "eager", "ours"], ["batch"], quick=False))
    base, swept = [job for job in every if job.sweep is None], [job for job in every if job.sweep]
    assert every == base + swept
    for part in (base, swept):
        assert list(dict.fromkeys(job.provider for job in part)) == ["ours", "eager", "compiled"]
    assert {job.size.batch for job in swept} == {1, 2, 4, 8, 16, 32, 64}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_mode_is_launched_and_replayed() -> None:
    bench = Bench(torch.device("cuda"), CudaClock(), PREDICTED_H200, budget_ms=1.0)
    rows = measure(Job("perplexity", Size(batch=1, resolution=64), "ours"), bench)
    modes = itertools.product(("forward", "backward", "both"), (False, True))
    assert [(row["mode"], row["graph"]) for row in rows] == list(modes)
    for row in rows:
        assert row["ms"] > 0, row
