"""One JSON of what bench/gpu_check.sh left: `python -m bench.runs.summarise FOLDER FILE.json`."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from bench.memory import BACKBONES
from cosa_fast.config.schema import Config
from cosa_fast.run import manifest

PREDICTED = Path(__file__).parents[1] / "results" / "memory_predicted.json"


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


def main(folder: Path, output: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = [json.loads(line) for line in (folder / "parts.jsonl").read_text(encoding="utf-8").splitlines()]
    summary: dict[str, Any] = {
        "machine": manifest.describe(Config(), device),
        "parts": parts,
        "tests": count_tests(folder / "tests"),
    }
    for name in ("kernels", "throughput", "ablations", "losses", "training", "data"):
        path = folder / f"{name}.json"
        summary[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    summary["memory"] = against_prediction(summary["throughput"], json.loads(PREDICTED.read_text(encoding="utf-8")))
    output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"written {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
