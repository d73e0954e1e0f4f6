"""The doors: from a clone that is not installed, as a file and as a module; and what they refuse."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from bench_support import assert_keys_of

from bench import ablate, data, kernels, memory, throughput
from bench.runs import precision
from cosa_fast.errors import UserError
from cosa_fast.kernels.launch.runtime import HAS_TRITON

ROOT = Path(__file__).resolve().parents[2]
DOORS = ("throughput", "kernels", "data", "memory", "thresholds")

# Hide an installed cosa_fast, then start every door as Python would; each looks both packages up anew.
START = """
import importlib.util, json, runpy, sys
from pathlib import Path
root, doors = Path(sys.argv[1]), json.loads(sys.argv[2])
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.path = ["", *(place for place in sys.path if not (Path(place) / "cosa_fast").exists())]
assert importlib.util.find_spec("cosa_fast") is None
for name, how, arguments in doors:
    sys.argv = [name, *arguments]
    sys.path[0] = str(root / "bench" if how == "file" else root)
    for module in ("bench", "bench.arguments", "cosa_fast", "cosa_fast.cli"):
        sys.modules.pop(module, None)
    try:
        if how == "file":
            runpy.run_path(str(root / "bench" / f"{name}.py"), run_name="__main__")
        else:
            runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code
    assert sys.path[0] == str(root)
    assert {Path(sys.modules[package].__file__).parents[1] for package in ("bench", "cosa_fast")} == {root}
"""


@dataclass
class Opened:
    """What the doors printed, and the result file of the one that did more than say how it is used."""

    printed: str
    results: Path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Every door as a file and as a module; that of the kernels compiles one, for which it wants a process without
    TRITON_INTERPRET."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    doors = [(name, how, ["--help"]) for name in DOORS for how in ("file", "module")]
    out = folder / "new" / "static.json"
    if HAS_TRITON:
        work = ["--static", "--quick", "--architectures", "sm_90", "--operators", "perplexity", "--out", str(out)]
        doors.append(("kernels", "file", work))
    command = [sys.executable, "-c", START, str(ROOT), json.dumps(doors)]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return Opened(run.stdout, out)


def test_every_door_opens_in_a_clone_that_is_not_installed(opened: Opened) -> None:
    for name in DOORS:
        assert opened.printed.count(f"usage: python bench/{name}.py ") == 2


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_without_a_gpu_the_kernels_resources_and_limits_are_told(opened: Opened) -> None:
    results = json.loads(opened.results.read_text(encoding="utf-8"))
    assert_keys_of("kernels_static.json", results)
    assert results["kind"] == "static"
    assert results["kernels_hash"] is None  # of one operator, which says nothing of all kernels
    for row in results["rows"]:
        assert (row["operator"], row["architecture"]) == ("perplexity", "sm_90")
        assert 0 < row["registers"] <= 512
        assert 0 <= row["shared"] <= row["shared_limit"]
    assert [row["mode"] for row in results["limits"]] == ["forward", "backward", "both"]
    assert results["limits"][0]["limit_ms"] == pytest.approx(1e3 * 16 * 448**2 * (2 + 4) / 4.8e12)
    assert results["limits"][0]["limited_by"] == "bytes"
    assert len(opened.results.with_suffix(".csv").read_text(encoding="utf-8").splitlines()) == 1 + len(results["rows"])
    assert "_perplexity_kernel" in opened.printed


@pytest.mark.parametrize(
    ("door", "arguments", "message"),
    [
        (throughput.main, ["--windows", "0"], "--windows 0: must be at least 1"),
        (throughput.main, ["--batch-sizes", "4", "0"], "--batch-sizes 0: must be at least 1"),
        (data.main, ["--workers", "1", "0"], "--workers 0: must be at least 1"),
        (data.main, ["--enlarge", "0"], "--enlarge 0: must be at least 1"),
        (memory.main, ["--batch-sizes", "-1"], "--batch-sizes -1: must be at least 1"),
        (memory.main, ["voc.yaml", "coco.yaml"], "voc.yaml coco.yaml: give one configuration"),
        (kernels.main, ["--processes", "0"], "--processes 0: must be at least 1"),
        (kernels.main, ["--operators", "perplexity", "histogrm"], "--operators: got 'histogrm', want of fuse_cams, "),
        (kernels.main, ["--providers", "theirs"], "--providers: got 'theirs', want of ours, eager, compiled"),
        (kernels.main, ["--sweeps", "width"], "--sweeps: got 'width', want of batch, "),
        (kernels.main, ["--architectures", "sm_1"], "--architectures: got 'sm_1', want of sm_80, "),
        (
            throughput.main,
            ["--provider=ours", "--windws", "3"],
            "unknown option --windws (did you mean '--windows'?)",
        ),
        (throughput.main, ["--attention", "--losses-only"], "--attention and --losses-only contradict each other; "),
        (kernels.main, ["--no-chart"], "--no-chart: has no effect without --out; add that, "),
        (data.main, ["--stages", "decodng"], "--stages: 'decodng' is none of "),
        (data.main, ["--images", "many"], "--images: 'many' is no whole number; all options"),
        (
            ablate.main,
            ["fig1.yaml", "--dry-run", "--out", "x.md"],
            "--out x.md: the results are JSON; choose a name that ends in ",
        ),
        *(
            (door, ["--out", "/dev/null/x.json"], "--out /dev/null/x.json: cannot be written (/dev/null is a file)")
            for door in (throughput.main, data.main, memory.main, kernels.main, precision.main)
        ),
    ],
)
def test_wrong_arguments_are_named(door: Callable[[list[str]], int], arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        door(arguments)
    assert str(error.value).startswith(message)


def test_a_result_is_written_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is not lost with what follows."""

    def stopped(*_: object, **__: object) -> object:
        yield [{"stage": "decode"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "measure_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        data.main(["voc.yaml", "run.device=cpu", "--out", str(tmp_path / "speed.json")])
    assert json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["results"] == [{"stage": "decode"}]
