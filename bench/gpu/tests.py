"""The tests that are marked for a GPU: `python -m bench.gpu.tests [--out FILE.json]`.

A process per file, eight at a time: most of the time goes into compiling kernels, on cores that would otherwise idle.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench.arguments import result_file
from cosa_fast.cli import run_cli
from cosa_fast.files import write_json

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = 8
LIMIT = 120  # seconds of a file
# The mark itself, or one of the fixtures that carry it.
MARKED = re.compile(r"mark\.gpu|kernel_device|def test_\w+\([^)]*\bdevice: torch\.device")


def files(folder: Path = ROOT / "tests") -> list[Path]:
    """Every file with a test for a GPU."""
    return [path for path in sorted(folder.rglob("test_*.py")) if MARKED.search(path.read_text(encoding="utf-8"))]


def run(path: Path, place: Path, arguments: list[str], limit: float = LIMIT) -> dict[str, Any]:
    """How many tests of a file passed, failed or were skipped, and the names of those that failed."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    xml = place / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", *arguments, str(path), f"--junitxml={xml}"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"file": name, "error": f"not done after {limit:.0f} s"}
    if not xml.is_file():
        lines = (found.stdout + found.stderr).strip().splitlines()
        return {"file": name, "error": lines[-1] if lines else f"status {found.returncode}"}
    suite = ElementTree.parse(xml).getroot().find("testsuite")
    assert suite is not None
    total, failures, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    bad = [case.get("name") for case in suite if case.find("failure") is not None or case.find("error") is not None]
    passed = total - failures - errors - skipped
    return {"file": name, "passed": passed, "failed": failures + errors, "skipped": skipped, "names": bad}


def main(argv: list[str] | None = None) -> int:
    """Run them; returns 1 if any fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tests", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="one file, on a CPU")
    parser.add_argument("--out", type=result_file, help="JSON")
    asked = parser.parse_args(argv)
    todo = [ROOT / "tests" / "kernels" / "test_histogram.py"] if asked.tiny else files()
    arguments = ["-k", "not hypothesis", "-x"] if asked.tiny else ["-m", "gpu"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(run, path, Path(place), arguments) for path in todo]
        for job in as_completed(jobs):
            rows.append(job.result())
            print(rows[-1], flush=True)
            if asked.out:
                write_json(asked.out, {"rows": rows})
    return int(any(row.get("error") or row["failed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
