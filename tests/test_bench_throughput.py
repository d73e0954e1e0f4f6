"""bench/throughput.py runs on a CPU, and compares what is comparable."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "model.backbone=vit_tiny_patch16_224", "data.crop_size=64", "optim.batch_size=2", "teacher.scales=[1.0]",
    "run.device=cpu", "run.threads=1", "run.backend=reference", "threshold.queue_length=4", "model.decoder_width=16",
]  # fmt: skip


def throughput(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/throughput.py", "voc.yaml", *SMALL, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def measured(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "speed.json"
    run = throughput("--windows", "2", "--steps", "1", "--out", str(out), *arguments)
    assert run.returncode == 0, run.stderr
    assert "they say nothing about a GPU" in run.stdout
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_whole_steps_of_all_providers(tmp_path: Path) -> None:
    written = measured(tmp_path, "--classes", "5")
    (result,) = written["results"]
    assert set(result["providers"]) == {"ours", "baseline", "ours, plain engine"}
    for row in result["providers"].values():
        assert row["ms_20"] <= row["ms"] <= row["ms_80"]
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"])
    assert set(result["phases_ms"]) == {"AN", "labels", "ON", "losses", "backward", "optimiser", "rest"}
    assert written["machine"]["device"] == "cpu"


@pytest.mark.slow
def test_losses_only_takes_less_memory_than_the_baseline(tmp_path: Path) -> None:
    written = measured(tmp_path, "--losses-only", "data.crop_size=128")
    rows = written["results"][0]["providers"]
    assert 0 < rows["ours"]["peak_mib"] < rows["baseline"]["peak_mib"]


def test_bad_numbers_are_refused_in_one_line() -> None:
    run = throughput("--windows", "0")
    assert run.returncode == 2
    assert run.stderr == "error: --windows, --steps and --classes must be at least 1\n"
