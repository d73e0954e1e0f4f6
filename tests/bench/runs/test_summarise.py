"""The summary of bench/gpu_check.sh: every part, what failed, memory beside its prediction."""

import json
from pathlib import Path

from bench.runs.summarise import summarise

JUNIT = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
<testcase classname="tests.engine.test_cuda_step" name="test_a"/>
<testcase classname="tests.engine.test_cuda_step" name="test_b"><failure>no</failure></testcase>
<testcase classname="tests.engine.test_cuda_step" name="test_c"><skipped/></testcase>
</testsuite></testsuites>"""


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
