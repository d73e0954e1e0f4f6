"""The kernel benchmark: its counts, its statistics, its results, and how it meets failures."""

import csv
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cosa_fast.errors import UserError
from cosa_fast.kernels.launch.runtime import HAS_TRITON

BENCH = Path(__file__).resolve().parents[2] / "bench"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("bench.kernels")


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    return importlib.import_module("bench.operators.cases")


@pytest.fixture(scope="module")
def timing() -> ModuleType:
    return importlib.import_module("bench.operators.timing")


def command(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(BENCH / "kernels.py"), *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_static_part_says_what_a_kernel_takes_and_what_limits_it(tmp_path: Path) -> None:
    out = tmp_path / "static.json"
    names = ("perplexity", "histogram")
    run = command(
        *("--static", "--quick", "--architectures", "sm_90", "gfx942", "--out", str(out), "--operators", *names),
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["kind"] == "static"
    assert {"date", "commit", "python", "torch", "triton", "gpu"} <= results["machine"].keys()
    assert {(row["operator"], row["architecture"]) for row in results["rows"]} == set(
        itertools.product(names, ("sm_90", "gfx942"))
    )
    for row in results["rows"]:
        assert {"kernel", "configuration", "spills", "shared_limit", "classes", "batch", "dtype"} <= row.keys(), row
        assert 0 < row["registers"] <= 512
        assert 0 <= row["shared"] <= row["shared_limit"]
    perplexity = [row for row in results["limits"] if row["operator"] == "perplexity"]
    assert [row["mode"] for row in perplexity] == ["forward", "backward", "both"]
    assert perplexity[0]["limit_ms"] == pytest.approx(1e3 * 16 * 448**2 * (2 + 4) / 4.8e12)
    assert perplexity[0]["limited_by"] == "bytes"
    with open(out.with_suffix(".csv"), encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"])
    assert "_perplexity_kernel" in run.stdout


def test_an_unknown_operator_is_one_clear_line() -> None:
    run = command("--operators", "perplexity", "histogrm")
    assert run.returncode == 2
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: --operators: got 'histogrm', want of fuse_cams, ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--providers", "theirs"],
        ["--sweeps", "width"],
        ["--architectures", "sm_1"],
        ["--out", "/no/such/folder/x.json"],
    ],
)
def test_other_bad_arguments_are_named(bench: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(UserError, match=f"^{arguments[0]}: "):
        bench.parse(arguments)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        # 2 · 32² elements: 2 bytes in, 4 out; backward 2 + 4 in, 2 out.
        ("perplexity", {"batch": 2, "resolution": 32}, {"forward": 12_288, "backward": 16_384, "both": 28_672}),
        # 3 · 2 · 2 logits of 4 bytes; 1024 pixels: two targets of 4 + 1 bytes, valid 1; backward: 48 bytes out besides.
        (
            "raw_cross_entropy",
            {"classes": 2, "batch": 1, "resolution": 32, "dtype": "fp32"},
            {"forward": 11_312, "backward": 11_360, "both": 22_672},
        ),
        # Three images with 1, 2, 3 classes, grids of 1, 2, 3: 2 · 6 · 14 · 2 = 336; labels 240; 3072 pixels · 6.
        ("fuse_cams", {"batch": 3, "resolution": 32}, {"forward": 336 + 240 + 18_432}),
    ],
)
def test_bytes_are_those_counted_by_hand(
    cases: ModuleType, name: str, size: dict[str, Any], expected: dict[str, int]
) -> None:
    problem = cases.OPERATORS[name].problem(cases.Size(**size), CPU, filled=False)
    assert {mode: cost.bytes for mode, cost in problem.costs.items()} == expected


def test_every_pixel_costs_an_exponential_a_channel(cases: ModuleType) -> None:
    size = cases.Size(classes=2, batch=1, resolution=32)
    problem = cases.OPERATORS["raw_cross_entropy"].problem(size, CPU, filled=False)
    assert problem.forward.exps == 32 * 32 * (3 + 1 + 2)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_pairs_are_counted_from_the_contents(cases: ModuleType, scope: str) -> None:
    """Against the masks of the definition, spelled out pair by pair."""
    size = cases.Size(classes=3, batch=2, resolution=96, variant=scope if scope == "batch" else "")
    problem = cases.OPERATORS["contrastive_separation"].problem(size, CPU)
    _, category, confidence, threshold, valid = problem.arguments
    label, usable = cases.reference.pseudo_labels(confidence, category, threshold, valid, 3)
    selected = usable & (cases.reference.perplexity(confidence, threshold) <= 1)
    points = [(int(image), int(label[image, y, x])) for image, y, x in selected.nonzero()]
    positive = negative = 0
    for first, second in itertools.permutations(points, 2):
        if scope == "batch" or first[0] == second[0]:
            positive += first[1] == second[1]
            negative += first[1] != second[1]
    assert positive > 0
    assert negative > 0
    assert problem.forward.exps == negative + 2 * positive
    assert problem.backward.exps == negative + positive


def test_the_contents_give_every_operator_something_to_do(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "PARAMETERS", 1000)
    for name, operator in cases.OPERATORS.items():
        problem = operator.problem(cases.Size(batch=3, resolution=96, dtype="fp32"), CPU)
        results = problem.function(*problem.arguments, **problem.keywords, backend="reference")
        if problem.backward is not None:
            (gradient,) = torch.autograd.grad(results.sum(), problem.inputs)
            assert torch.isfinite(gradient).all(), name
            assert (gradient != 0).any(), name
        elif results is not None:
            first = results if isinstance(results, torch.Tensor) else results[0]
            assert torch.isfinite(first).all(), name
            assert (first > 0).any(), name


def test_quantiles_lie_between_the_nearest_runs(timing: ModuleType) -> None:
    found = timing.summarise([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.ms, found.ms_20, found.ms_80, found.repetitions) == (3.0, pytest.approx(1.8), pytest.approx(4.2), 5)
    assert timing.summarise([7.0]) == timing.Timing(7.0, 7.0, 7.0, 1)


class FakeTime:
    """A clock that a run advances; the time outside runs does not count."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.now, self.runs, self._seconds = 0.0, 0, seconds

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.runs += 1
        self.now += next(self._seconds)


def test_the_warm_up_is_not_counted_and_the_budget_is_kept(timing: ModuleType) -> None:
    # Warm-up of 9 s, estimate of 2 ms, then runs of 1 and 3 ms in turn.
    fake = FakeTime(itertools.chain([9.0, 0.002], itertools.cycle([0.001, 0.003])))
    found = timing.time_run(fake.run, timing.HostClock(fake), budget_ms=20.0)
    assert fake.runs == 12
    assert found.repetitions == 10
    assert (found.ms, found.ms_20, found.ms_80) == (pytest.approx(2.0), pytest.approx(1.0), pytest.approx(3.0))


@pytest.mark.parametrize(("seconds", "repetitions"), [(1.0, "FEWEST"), (1e-9, "MOST")])
def test_repetitions_have_bounds(timing: ModuleType, seconds: float, repetitions: str) -> None:
    fake = FakeTime(itertools.repeat(seconds))
    assert timing.time_run(fake.run, timing.HostClock(fake), 10.0).repetitions == getattr(timing, repetitions)


def test_the_limit_is_that_of_the_scarcest(cases: ModuleType, timing: ModuleType) -> None:
    limits = timing.Limits("test", bytes=1e9, exps=1e6, flops=1e12, replay_ms=0.003, next_launch_ms=0.001)
    assert limits.least(cases.Cost(bytes=10**6, exps=10**4, flops=10**6)) == (pytest.approx(10.0), "exps")
    assert limits.least(cases.Cost(bytes=10**8, exps=10**4)) == (pytest.approx(100.0), "bytes")
    assert limits.launching(3) == pytest.approx(0.005)


def test_every_mode_is_timed(bench: ModuleType, cases: ModuleType, timing: ModuleType) -> None:
    job = bench.Job("perplexity", cases.Size(batch=1, resolution=32), "eager")
    rows = bench.measure(job, CPU, timing.HostClock(), timing.PREDICTED_H200, 1.0)
    assert [row["mode"] for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert "error" not in row
        assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
        assert row["share"] == pytest.approx(row["limit_ms"] / row["ms"])
    assert bench.print_measured(results(timing, rows)) is None


def test_a_failure_is_recorded_and_the_rest_goes_on(
    bench: ModuleType, cases: ModuleType, timing: ModuleType, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def broken(size: Any, scene: Any) -> None:
        raise torch.OutOfMemoryError("no room\nfor details")

    monkeypatch.setitem(bench.OPERATORS, "histogram", cases.Operator(broken, frozenset()))
    rows = [
        row
        for name in ("histogram", "fit_mixture")
        for row in bench.measure(
            bench.Job(name, cases.Size(), "eager"), CPU, timing.HostClock(), timing.PREDICTED_H200, 1.0
        )
    ]
    assert rows[0]["error"] == "OutOfMemoryError: no room"
    assert rows[1]["ms"] > 0
    bench.write(tmp_path / "rows.json", results(timing, rows))
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"] == rows
    bench.print_measured(results(timing, rows))
    assert "error: histogram C=20 B=16 448 bf16 eager: OutOfMemoryError: no room" in capsys.readouterr().out


def test_the_definition_is_compiled_only_where_that_can_end(
    bench: ModuleType, cases: ModuleType, timing: ModuleType
) -> None:
    job = bench.Job("dense_energy", cases.Size(), "compiled")
    (row,) = bench.measure(job, CPU, timing.HostClock(), timing.PREDICTED_H200, 1.0)
    assert row["error"].startswith("not tried: ")


def test_what_a_budget_cuts_off_is_the_least_wanted(bench: ModuleType) -> None:
    every = list(bench.jobs(["perplexity", "histogram"], ["compiled", "eager", "ours"], ["batch"], quick=False))
    base, swept = [job for job in every if job.sweep is None], [job for job in every if job.sweep]
    assert every == base + swept
    for part in (base, swept):
        assert list(dict.fromkeys(job.provider for job in part)) == ["ours", "eager", "compiled"]
    assert {job.size.batch for job in swept} == {1, 2, 4, 8, 16, 32, 64}


def results(timing: ModuleType, rows: list[dict[str, Any]]) -> dict[str, Any]:
    machine = dict.fromkeys(("gpu", "torch", "triton", "commit", "date"))
    return {"kind": "measured", "machine": machine, "limits": vars(timing.PREDICTED_H200), "rows": rows}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnCuda:
    """What only a CUDA device can show."""

    def test_a_replay_computes_what_the_run_does_after_its_memory_could_be_reused(self, timing: ModuleType) -> None:
        values, found = torch.arange(1000.0, device="cuda"), torch.empty(1000, device="cuda")

        def prepare() -> Any:
            kept = values * 2  # nobody else holds it
            return lambda: found.copy_(kept + 1)

        replay = timing.captured(prepare)
        found.zero_()
        torch.cuda.empty_cache()
        other = [torch.full((1000,), torch.nan, device="cuda") for _ in range(100)]
        replay()
        assert torch.equal(found, values * 2 + 1)
        assert len(other) == 100

    def test_a_run_that_waits_for_the_device_is_refused_and_the_next_is_captured(self, timing: ModuleType) -> None:
        values = torch.ones(10, device="cuda")
        with pytest.raises(timing.NotCaptured, match="synchronizing"):
            timing.captured(lambda: lambda: values.sum().item())
        timing.captured(lambda: lambda: values.add_(1))()
        torch.cuda.synchronize()

    def test_every_mode_is_launched_and_replayed(
        self, bench: ModuleType, cases: ModuleType, timing: ModuleType
    ) -> None:
        job = bench.Job("perplexity", cases.Size(batch=1, resolution=64), "ours")
        rows = bench.measure(job, torch.device("cuda"), timing.CudaClock(), timing.PREDICTED_H200, 1.0)
        assert [(row["mode"], row["graph"]) for row in rows] == list(
            itertools.product(("forward", "backward", "both"), (False, True))
        )
        for row in rows:
            assert row["ms"] > 0, row
