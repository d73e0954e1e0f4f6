"""bench/gpu_check.sh: what of it can be tested where there is no GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import throughput

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"
JUNIT = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
<testcase classname="tests.engine.test_cuda_step" name="test_a"/>
<testcase classname="tests.engine.test_cuda_step" name="test_b"><failure>no</failure></testcase>
<testcase classname="tests.engine.test_cuda_step" name="test_c"><skipped/></testcase>
</testsuite></testsuites>"""


def summarise(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.runs.summarise", str(folder), str(folder / "summary.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_refuses_without_a_gpu_and_writes_no_result(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr == "error: torch sees no CUDA device; bench/gpu_check.sh needs one\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_its_parts_fit_into_nine_minutes() -> None:
    limits = [int(limit) for limit in re.findall(r"^\s*(?:part|steps) [a-z]+ (\d+) ", SCRIPT.read_text(), re.M)]
    assert len(limits) == 7
    assert sum(limits) < 9 * 60


def test_its_commands_know_their_options() -> None:
    text = SCRIPT.read_text()
    for script in set(re.findall(r"bench/\w+\.py", text)):
        assert (ROOT / script).is_file(), script
    lines = re.findall(r"^steps \w+ \d+ (.*)$", text, re.M)
    assert len(lines) == 3
    for line in lines:
        assert throughput.parse(line.split()).budget < 60


def test_the_summary_holds_every_part_and_says_what_failed(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_cuda_step.xml").write_text(JUNIT)
    for name in ("test_cuda_step", "test_hung"):
        (tmp_path / "tests" / f"{name}.log").write_text("")
    parts = [
        {"part": "tests", "status": 1, "seconds": 80, "limit": 150},
        {"part": "kernels", "status": 124, "seconds": 130, "limit": 130},
    ]
    (tmp_path / "parts.jsonl").write_text("".join(json.dumps(part) + "\n" for part in parts))
    ours = {"ms": 80.0, "peak_mib": 7000.0}
    result = {"backbone": "vit_base_patch16_224.orig_in21k_ft_in1k", "batch_size": 16, "crop": 448}
    speed = {"results": [{**result, "providers": {"ours": ours}}], "matrix_rate": {"flop_per_second": 7e14}}
    (tmp_path / "throughput.json").write_text(json.dumps(speed))
    summary = summarise(tmp_path)
    assert summary["parts"] == parts
    assert summary["tests"] == {
        "tests": 3, "failures": 1, "errors": 0, "skipped": 1,
        "failed": ["tests.engine.test_cuda_step.test_b"], "unfinished": ["test_hung"],
    }  # fmt: skip
    assert summary["throughput"] == speed
    assert all(summary[name] is None for name in ("kernels", "ablations", "losses", "training", "data"))
    assert {"commit", "device", "packages", "cuda"} <= set(summary["machine"])
    (memory,) = summary["memory"]
    assert (memory["backbone"], memory["batch_size"], memory["measured_mib"]) == ("ViT-B/16", 16, 7000.0)
    assert memory["predicted_mib"] > 1000


def test_a_provider_that_failed_has_no_memory_to_compare(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "parts.jsonl").write_text("")
    result = {"backbone": "vit_base_patch16_224", "batch_size": 16, "crop": 448}
    speed = {"results": [{**result, "providers": {"ours": {"error": "out of memory"}}}]}
    (tmp_path / "throughput.json").write_text(json.dumps(speed))
    assert summarise(tmp_path)["memory"] == []
