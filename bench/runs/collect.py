"""Gather finished runs into one result file: `python -m bench.runs.collect runs/NAME... -o FILE.json`.

Per run: the last evaluation, the manifest, the configuration, the time spent in training steps, and the logged curve.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

CURVE = ("loss", "cls", "cls_aux", "c2s", "c2s_aux", "s2c", "csc", "xi", "xi_aux", "foreground_share")


def collect(run: Path) -> dict[str, Any]:
    """What a run's folder says of it."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    spans = [
        step["iteration"] - before for step, before in zip(steps, [0, *(s["iteration"] for s in steps)], strict=False)
    ]
    seconds = sum(step["seconds_per_iteration"] * span for step, span in zip(steps, spans, strict=True))
    return {
        "results": {record["network"]: record for record in records if record["kind"].startswith("eval_")},
        "training_minutes": round(seconds / 60, 1),
        "manifest": json.loads((run / "manifest.json").read_text(encoding="utf-8")),
        "config": yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")),
        "curve": [
            {"iteration": step["iteration"], **{name: round(step[name], 4) for name in CURVE if name in step}}
            for step in steps
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    collected = {run.name: collect(run) for run in arguments.runs}
    for entry in collected.values():
        # Paths of the machine say nothing to a reader.
        entry["config"]["data"]["root"] = Path(entry["config"]["data"]["root"]).name
        entry["config"]["model"]["weights"] = Path(entry["config"]["model"]["weights"]).name
    arguments.output.write_text(json.dumps(collected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
