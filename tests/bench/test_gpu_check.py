"""bench/gpu_check.sh, run with a stand-in for Python that writes down what it is asked to do: what of the check can be
tested where there is no GPU."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import data, kernels, throughput
from bench.runs import summarise
from cosa_fast.config.parsing import load_config

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["tests", "kernels", "throughput", "ablations", "losses", "training", "data"]

# A GPU is there as CUDA says, LACKING is what is not installed; every other call is written down, and fails or hangs if
# its command line holds FAILS or HANGS.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then
    [[ "$2" != *is_available* ]] || exit "$CUDA"
    absent=()
    for name in "${@:3}"; do [[ " $LACKING " != *" $name "* ]] || absent+=("$name"); done
    echo "${absent[*]}"
    exit 0
fi
printf '%s\\n' "$(printf '%s\\t' "$@")" >>"$CALLS"
[[ -z "$HANGS" || "$*" != *"$HANGS"* ]] || exec sleep 60
[[ -z "$FAILS" || "$*" != *"$FAILS"* ]] || { echo "went wrong"; exit 3; }
"""
# The real one, but a call that hangs is not waited for long.
TIMEOUT = """#!/usr/bin/env bash
[[ -z "$HANGS" || "$*" != *"$HANGS"* ]] || exec "$REAL_TIMEOUT" --kill-after=1 0.2 "${@:3}"
exec "$REAL_TIMEOUT" "$@"
"""


@dataclass
class Check:
    """A run of the script: its folder, and the arguments of every call of Python."""

    folder: Path
    process: "subprocess.CompletedProcess[str]"
    calls: list[list[str]]

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        lines = (self.folder / "parts.jsonl").read_text(encoding="utf-8").splitlines()
        return {part["part"]: part for part in map(json.loads, lines)}

    def arguments(self, *command: str) -> list[list[str]]:
        """Those of every call of a command."""
        return [call[len(command) :] for call in self.calls if call[: len(command)] == list(command)]


def check(folder: Path, *, cuda: bool = True, lacking: str = "", fails: str = "", hangs: str = "") -> Check:
    tools, calls = folder / "tools", folder / "calls"
    tools.mkdir()
    calls.touch()
    for name, text in (("python", PYTHON), ("timeout", TIMEOUT)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "REAL_TIMEOUT": str(shutil.which("timeout")),
        "PYTHON": str(tools / "python"), "CALLS": str(calls), "CUDA": "0" if cuda else "1", "LACKING": lacking,
        "FAILS": fails, "HANGS": hangs,
    }  # fmt: skip
    command = ["bash", str(ROOT / "bench" / "gpu_check.sh"), str(folder / "out")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return Check(folder / "out", process, [line.split("\t")[:-1] for line in calls.read_text().splitlines()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Everything is installed, the kernels fail, the losses hang."""
    return check(tmp_path_factory.mktemp("whole"), fails="kernels.py", hangs="--losses-only")


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ({"cuda": False}, "torch sees no CUDA device; bench/gpu_check.sh needs one"),
        ({"lacking": "timm triton"}, "/python has no triton timm; bench/gpu_check.sh needs them"),
    ],
)
def test_it_refuses_in_one_line_and_writes_no_result(tmp_path: Path, lacks: dict[str, Any], message: str) -> None:
    found = check(tmp_path, **lacks)
    assert found.process.returncode == 2
    assert found.process.stderr.startswith("error: ")
    assert found.process.stderr.endswith(f"{message}\n")
    assert found.process.stdout == ""
    assert not found.calls
    assert list(found.folder.iterdir()) == []


def test_its_first_line_says_what_is_missing(tmp_path: Path, whole: Check) -> None:
    assert whole.process.stdout.splitlines()[0] == "not installed: nothing that a part needs"
    found = check(tmp_path, lacking="pytest matplotlib nvidia.dali")
    assert found.process.stdout.splitlines()[0] == "not installed: pytest matplotlib"
    assert list(found.parts) == PARTS[:-1]  # without DALI no data pipelines


def test_a_part_that_fails_or_hangs_is_recorded_and_the_others_go_on(whole: Check) -> None:
    assert whole.process.returncode == 0
    statuses = {name: part["status"] for name, part in whole.parts.items()}
    assert statuses == {**dict.fromkeys(PARTS, 0), "kernels": 3, "losses": 124}
    assert list(statuses) == PARTS
    assert "went wrong" in whole.process.stdout
    assert (whole.folder / "kernels.log").read_text() == "went wrong\n"


def test_its_parts_fit_into_nine_minutes(whole: Check) -> None:
    assert sum(part["limit"] for part in whole.parts.values()) < 9 * 60
    for arguments, name in zip(
        whole.arguments("bench/throughput.py"), ("throughput", "ablations", "losses"), strict=True
    ):
        assert throughput.parse(arguments).budget < whole.parts[name]["limit"]
    (arguments,) = whole.arguments("bench/kernels.py")
    assert kernels.parse(arguments).budget < whole.parts["kernels"]["limit"]


def test_its_commands_are_understood_and_write_where_the_summary_reads(whole: Check) -> None:
    files = {
        "kernels": [kernels.parse(line).out for line in whole.arguments("bench/kernels.py")],
        "throughput": [throughput.parse(line).out for line in whole.arguments("bench/throughput.py")],
        "data": [data.parse(line).out for line in whole.arguments("bench/data.py")],
    }
    written = [path.relative_to(whole.folder).name for paths in files.values() for path in paths]
    assert written == ["kernels.json", "throughput.json", "ablations.json", "losses.json", "data.json"]
    assert {Path(name).stem for name in written} == {*summarise.PARTS} - {"training"}
    (overrides,) = whole.arguments("-m", "cosa_fast.demo")
    run = load_config("demo.yaml", overrides).run
    assert (run.device, Path(run.output)) == ("cuda", whole.folder / "runs")
    (line,) = whole.arguments("-m", "bench.runs.summarise")
    assert summarise.main(line) == 0
    summary = json.loads((whole.folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["parts"] == list(whole.parts.values())


def test_every_file_of_gpu_tests_is_run_once_with_a_log_of_its_own(
    whole: Check, request: pytest.FixtureRequest
) -> None:
    calls = whole.arguments("-m", "pytest", "-m", "gpu", "-q")
    files = [call[0] for call in calls]
    assert len(set(files)) == len(files) > 5
    assert len({call[1] for call in calls}) == len(files)
    # Of the tests collected beside this one: all of them when the whole suite runs.
    marked = {str(item.path.relative_to(ROOT)) for item in request.session.items if item.get_closest_marker("gpu")}
    with_dali = {name for name in marked if "/dali/" in name}
    assert marked - with_dali <= set(files)
    assert {path.stem for path in (whole.folder / "tests").glob("*.log")} == {
        file.removeprefix("tests/").removesuffix(".py").replace("/", ".") for file in files
    }
