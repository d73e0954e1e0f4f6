"""bench/data.py measures every pipeline, and refuses numbers that mean nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chart_support import assert_chart

from cosa_fast.data_pipeline.datasets.synthetic import generate

ROOT = Path(__file__).resolve().parents[2]


def bench(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    overrides = [f"data.root={root}", "data.train_split=train", "data.crop_size=32", "optim.batch_size=2"]
    command = [sys.executable, "bench/data.py", "voc.yaml", *overrides, "run.device=cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_image_set_and_pipeline_is_measured(tmp_path: Path) -> None:
    generate(tmp_path / "set", train=6, val=1, size=48)
    out = tmp_path / "speed.json"
    numbers = ["--images", "4", "--windows", "2", "--batches", "8", "--workers", "1", "--enlarge", "96"]
    numbers += ["--stages", "decode", "both"]
    run = bench(tmp_path / "set", *numbers, "--out", str(out))
    assert run.returncode == 0, run.stderr
    assert run.stderr == "", "worker processes end quietly"
    assert_chart(out.with_suffix(".png"))
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["machine"]["file_cache"], written["machine"]["cores"] > 0) == ("warm", True)
    results = written["results"]
    assert [result["stage"] for result in results] == ["decode", "both"] * 2
    assert [result["images"]["enlarged_to"] for result in results] == [None] * 2 + [96] * 2
    assert [result["images"]["mean_megapixels"] for result in results[::2]] == pytest.approx(
        [48e-4 * 0.48, 96e-4 * 0.96]
    )
    expected = {"torch, 1 worker, files", "torch, 1 worker, packed"}
    if importlib.util.find_spec("nvidia.dali") is not None:
        expected |= {"DALI, 1 thread, files", "DALI, 1 thread, packed"}
    for result in results:
        assert set(result["images"]["read_images_per_second"]) == {"files", "packed"}
        assert expected <= set(result["providers"])
        for name, row in result["providers"].items():
            assert name in run.stdout
            assert row["windows"] == 2
            assert 0 < row["images_per_second_20"] <= row["images_per_second"] <= row["images_per_second_80"]
            assert row["cpu_seconds_per_1000"] >= 0
            assert row["peak_rss_mib"] > 50


@pytest.mark.parametrize("numbers", [("--windows", "0"), ("--workers", "1", "0"), ("--enlarge", "0")])
def test_bad_numbers_are_refused_in_one_line(tmp_path: Path, numbers: tuple[str, ...]) -> None:
    run = bench(tmp_path, *numbers)
    assert run.returncode == 2
    assert run.stderr == "error: --windows, --batches, --images, --enlarge and --workers must be at least 1\n"
