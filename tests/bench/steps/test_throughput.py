"""bench/throughput.py runs on a CPU, and compares what is comparable."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_support import assert_chart, assert_keys_of

from bench import throughput
from bench.steps.comparison import OUT_OF_TIME, Plan, compare, matrix_rate
from bench.steps.providers import (
    ABLATIONS,
    KINDS,
    OneBatch,
    Step,
    attention_providers,
    changed,
    class_count,
    providers,
    synthetic_batch,
)
from bench.steps.throughput import grid
from bench.tables import OUT_OF_MEMORY
from bench.timing import Timing
from cosa_fast.config.parsing import load_config
from cosa_fast.data_pipeline.datasets.synthetic import generate
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.errors import UserError

CPU = torch.device("cpu")
SMALL = [
    "model.backbone=vit_tiny_patch16_224", "data.crop_size=64", "optim.batch_size=2", "teacher.scales=[1.0]",
    "run.device=cpu", "run.threads=1", "threshold.queue_length=4", "model.decoder_width=16",
    "model.arguments={embed_dim: 48, depth: 3, num_heads: 3}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rate is measured on smaller products than a user's."""
    monkeypatch.setattr("bench.steps.comparison.SIDES", {"cpu": (64, 128)})


def measured(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "speed.json"
    assert throughput.main([*SMALL, "--windows", "2", "--steps", "1", "--out", str(out), *arguments]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_whole_steps_of_all_providers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = measured(tmp_path, "--classes", "5")
    assert_keys_of("throughput_cpu.json", written)
    (result,) = written["results"]
    assert set(result["providers"]) == {"ours", "baseline", "ours, plain engine", "ours, packed attention"}
    rate = written["matrix_rate"]["flop_per_second"]
    for row in result["providers"].values():
        assert row["ms_20"] <= row["ms"] <= row["ms_80"]
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"])
        assert row["tflop_per_second"] == pytest.approx(result["gflop_per_step"] / row["ms"])
        assert row["share_of_matrix_rate"] == pytest.approx(row["tflop_per_second"] * 1e12 / rate)
    assert list(result["phases_ms"]) == ["AN", "labels", "ON", "losses", "backward", "optimiser", "rest"]
    assert written["machine"]["device"] == "cpu"
    assert_chart(tmp_path / "speed.png")
    printed = capsys.readouterr().out
    assert all(f"\n{name}  " in printed for name in result["providers"])
    assert "they say nothing about a GPU" in printed


def test_real_batches_are_streamed_and_waited_for(tmp_path: Path) -> None:
    generate(tmp_path / "set", train=6, val=1, size=64)
    data = ["data.format=synthetic", f"data.root={tmp_path / 'set'}", "data.train_split=train", "data.val_split=val"]
    written = measured(
        tmp_path, "--data", "real", "--providers", "ours", *data, "data.pipeline=torch", "data.workers=0"
    )
    (result,) = written["results"]
    row = result["providers"]["ours"]
    # Without workers every image is read while the step waits.
    assert 1 < row["data_wait_ms"] < row["ms"]
    assert result["phases_ms"]["data wait"] == row["data_wait_ms"]
    assert result["classes"] == 5


def test_the_suite_has_both_data_sets_with_their_classes() -> None:
    asked = throughput.parse(["--suite", "--batch-sizes", "1", "2"])
    cells = list(grid(asked.configs, asked.overrides, asked.backbones, asked.batch_sizes))
    found = [(class_count(cell, None), cell.model.backbone, cell.optim.batch_size) for cell in cells]
    backbones = [f"vit_{size}_patch16_224" for size in ("small", "base", "large")]
    assert found == [(classes, name, size) for classes in (20, 80) for name in backbones for size in (1, 2)]


def test_losses_only_takes_less_memory_than_the_baseline(tmp_path: Path) -> None:
    written = measured(tmp_path, "--losses-only", "data.crop_size=128", "--batch-sizes", "1", "2")
    assert_keys_of("losses_voc_cpu.json", written)
    assert [result["batch_size"] for result in written["results"]] == [1, 2]
    for result in written["results"]:
        rows = result["providers"]
        assert 0 < rows["ours"]["peak_mib"] < rows["baseline"]["peak_mib"]


def test_a_spent_budget_leaves_providers_out_but_writes_the_file(tmp_path: Path) -> None:
    (result,) = measured(tmp_path, "--budget", "0")["results"]
    assert {row["error"] for row in result["providers"].values()} == {OUT_OF_TIME}


@pytest.mark.parametrize("turns", [True, False])
def test_a_provider_without_memory_is_recorded_and_the_others_go_on(turns: bool) -> None:
    calls = {"good": 0, "late": 0}

    def good(_: object) -> None:
        calls["good"] += 1

    def late(_: object) -> None:
        calls["late"] += 1
        if calls["late"] == 3:
            torch.empty(2**60)

    def too_large() -> None:
        torch.empty(2**60)

    batch = synthetic_batch(load_config("voc.yaml", SMALL), 2, CPU)
    plan = Plan(CPU, windows=3, per_window=2, turns=turns, deadline=float("inf"))
    makers = {"large": too_large, "late": lambda: late, "good": lambda: good}
    timings = compare(makers, lambda: OneBatch(batch), plan)
    assert timings["large"].error == timings["late"].error == OUT_OF_MEMORY
    assert timings["good"].error is None
    assert len(timings["good"].milliseconds) == 3
    assert calls == {"good": 1 + 3 * 2, "late": 3}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_what_it_says(name: str) -> None:
    """Its override alone: the configuration differs in that key from the one of `ours`, and a GPU's defaults are not
    already what it asks for."""
    config = load_config("voc.yaml")
    other = changed(config, ABLATIONS[name])
    (override,) = ABLATIONS[name]
    section, key = override.partition("=")[0].split(".")
    before = getattr(getattr(config, section), key)
    assert before in ("auto", "fused", "sdpa")
    assert getattr(getattr(other, section), key) == override.partition("=")[2]


def test_the_class_count_follows_the_configuration() -> None:
    assert class_count(load_config("voc.yaml"), None) == 20
    assert class_count(load_config("coco.yaml"), None) == 80
    assert class_count(load_config("coco.yaml", ["data.classes=[a, b]"]), None) == 2
    assert class_count(load_config("coco.yaml"), 7) == 7
    with pytest.raises(UserError, match="give --classes N"):
        class_count(load_config("voc.yaml", ["data.format=folder"]), None)


def test_the_matrix_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e6 < matrix_rate(CPU, torch.float32, (64,))["flop_per_second"] < 1e15
    times = iter([Timing(1.0, 1.0, 1.0, 3), Timing(2.0, 2.0, 2.0, 3), Timing(1e3, 1e3, 1e3, 3)])
    monkeypatch.setattr("bench.steps.comparison.time_run", lambda *_: next(times))
    assert matrix_rate(CPU, torch.float32, (16, 32, 48)) == {
        "flop_per_second": 2000 * 32**3 / 2.0, "side": 32, "type": "float32",
    }  # fmt: skip


def test_every_kernel_for_attention_has_a_row_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(tmp_path, "--classes", "5", "--attention", "--no-chart")["results"][0]["providers"]
    expected = {f"{network} by {kind}" for network in ("ON", "AN") for kind in KINDS} - {"ON by packed"}
    assert set(found) == {"ours", *expected}
    printed = capsys.readouterr().out
    for name, row in found.items():
        if name.split()[-1] in ("ours", "sdpa", "flash", "packed"):
            assert row["ms"] > 0
        else:
            key = {"ON": "model", "AN": "teacher"}[name[:2]]
            assert row["error"].startswith(f"{key}.attention={name.split()[-1]}: needs a GPU, ")
            assert f"{name}: failed: {row['error']}" in printed
    assert set(attention_providers(load_config("voc.yaml", SMALL), 5, CPU, ["flash"])) == {
        "ours", "AN by flash", "ON by flash",
    }  # fmt: skip


def test_a_wrong_setting_ends_the_run_but_that_of_an_ablation_does_not() -> None:
    with pytest.raises(UserError, match="did you mean 'vit_tiny_patch16_224'"):
        throughput.main([*SMALL, "model.backbone=vit_tinny_patch16_224"])
    config = load_config("voc.yaml", SMALL)
    plan = Plan(CPU, windows=1, per_window=1, turns=True, deadline=float("inf"))
    batch = synthetic_batch(config, 5, CPU)

    def varlen() -> Step:
        return FusedEngine(changed(config, ABLATIONS["ours, varlen attention"]), 5, CPU).step

    timings = compare({"varlen": varlen}, lambda: OneBatch(batch), plan)
    assert timings["varlen"].error is not None
    assert timings["varlen"].error.startswith("teacher.attention=varlen: needs a GPU")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.csc_scope=batch", "loss.csc_scope = batch: the baseline only has image"),
        ("optim.accumulate=2", "optim.accumulate: the baseline takes the batch in one pass"),
    ],
)
def test_what_the_baseline_lacks_is_refused_before_anything_is_timed(override: str, message: str) -> None:
    config = load_config("voc.yaml", [*SMALL, override])
    with pytest.raises(UserError, match=f"{message}; or compare with --providers ours"):
        providers(config, 5, CPU, "all")
