"""bench/runs/precision.py: the loss curves of bfloat16 and float32 training lie on each other."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cosa_fast.config.parsing import config_to_dict
from cosa_fast.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]


def precision(config: Config, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bench.runs.precision", str(path), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_window_means_of_both_precisions_agree(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config("optim.iterations=48", "optim.cotrain_after=16", "optim.lr=2e-4", "teacher.scales=[1.0]")
    out = tmp_path / "precision.json"
    run = precision(config, tmp_path, "--window", "8", "--out", str(out))
    assert run.returncode == 0, run.stderr
    written = json.loads(out.read_text(encoding="utf-8"))
    assert set(written["phases"]) == {"classification", "co-training"}
    assert "c2s" not in written["phases"]["classification"]
    for terms in written["phases"].values():
        for name in ("loss", "cls", "cls_aux"):
            assert len(terms[name]["fp32"]) == len(terms[name]["bf16"]) >= 2
            assert terms[name]["fp32"] != terms[name]["bf16"]  # two precisions, not one run twice
            assert terms[name]["largest_difference"] < 0.03, name
    assert set(written["evaluation"]) == {"fp32", "bf16"}


def test_a_window_longer_than_the_run_is_refused(make_config: Callable[..., Config], tmp_path: Path) -> None:
    run = precision(make_config(), tmp_path, "--window", "7")
    assert run.returncode == 2
    assert run.stderr == "error: --window 7: give 1 to optim.iterations = 6\n"
