"""One JSON of what bench/gpu_check.sh left: `python -m bench.runs.summarise FOLDER FILE.json`."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from bench.arguments import result_file
from bench.runs.reading import read_records
from bench.steps.providers import BACKBONES
from cosa_fast.cli import run_cli
from cosa_fast.config.schema import Config
from cosa_fast.files import read_json, write_json
from cosa_fast.run import manifest

PREDICTED = Path(__file__).parents[1] / "results" / "memory_predicted.json"
PARTS = ("kernels", "throughput", "ablations", "losses", "training", "data")


def count_tests(folder: Path) -> dict[str, Any]:
    """Numbers of tests and the names of those that failed, from the JUnit XML of each file; `unfinished` are the files
    that left none."""
    counts: dict[str, Any] = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    failed = []
    for path in sorted(folder.glob("*.xml")):
        suite = ElementTree.parse(path).getroot().find("testsuite")
        assert suite is not None
        for name in counts:
            counts[name] += int(suite.get(name, 0))
        bad = (case for case in suite if case.find("failure") is not None or case.find("error") is not None)
        failed += [f"{case.get('classname')}.{case.get('name')}" for case in bad]
    unfinished = sorted(log.stem for log in folder.glob("*.log") if not log.with_suffix(".xml").is_file())
    return {**counts, "failed": failed, "unfinished": unfinished}


def against_prediction(throughput: dict[str, Any] | None, predicted: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured peak memory of ours beside the predicted one (bench/memory.py), for VOC's size of images."""
    rows = []
    for result in throughput["results"] if throughput else []:
        peak = result["providers"]["ours"].get("peak_mib")
        for row in predicted["rows"]:
            same = BACKBONES[row["backbone"]] == result["backbone"].split(".")[0]
            same = same and (row["batch_size"], row["checkpoint_blocks"]) == (result["batch_size"], False)
            if same and peak is not None and result["crop"] == predicted["crop"]:
                found = {"backbone": row["backbone"], "batch_size": row["batch_size"], "measured_mib": peak}
                rows.append({**found, "predicted_mib": row["peak_mib"]})
    return rows


def summarise(folder: Path) -> dict[str, Any]:
    """The machine, how the parts ended, and every part's own results; None for one that left none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    summary: dict[str, Any] = {
        "machine": manifest.describe(Config(), device),
        "parts": read_records(folder / "parts.jsonl"),
        "tests": count_tests(folder / "tests"),
    }
    for name in PARTS:
        path = folder / f"{name}.json"
        summary[name] = read_json(path) if path.is_file() else None
    summary["memory"] = against_prediction(summary["throughput"], read_json(PREDICTED))
    return summary


def main(argv: list[str] | None = None) -> int:
    """Write the file; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.runs.summarise", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=result_file)
    arguments = parser.parse_args(argv)
    write_json(arguments.output, summarise(arguments.folder))
    print(f"written {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
