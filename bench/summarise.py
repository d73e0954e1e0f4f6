"""One JSON of what bench/gpu_check.sh left: `python bench/summarise.py FOLDER FILE.json`."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from cosa_fast import manifest
from cosa_fast.config import Config


def count_tests(path: Path) -> dict[str, Any] | None:
    """Numbers of tests, and the names of those that failed, from JUnit's XML."""
    if not path.is_file():
        return None
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None
    failed = [f"{case.get('classname')}.{case.get('name')}" for case in suite if case.find("failure") is not None]
    numbers = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {**numbers, "failed": failed}


def main(folder: Path, output: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = [json.loads(line) for line in (folder / "parts.jsonl").read_text(encoding="utf-8").splitlines()]
    summary: dict[str, Any] = {
        "machine": manifest.describe(Config(), device),
        "parts": parts,
        "tests": count_tests(folder / "tests.xml"),
    }
    for name in ("kernels", "throughput", "losses", "training"):
        path = folder / f"{name}.json"
        summary[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"written {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
