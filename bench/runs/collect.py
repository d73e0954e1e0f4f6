"""Gather finished runs into one result file: `python -m bench.runs.collect runs/NAME... -o FILE.json`.

Per run: the last evaluation, the manifest, the configuration, the time spent in training steps, and the logged curve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.arguments import result_file
from bench.runs.reading import read_run
from bench.tables import TERMS
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.files import write_json

CURVE = (*TERMS, "foreground_share")


def collect(path: Path) -> dict[str, Any]:
    """What a run's folder says of it; of the machine's paths only the last names."""
    run = read_run(path)
    config = run.config
    for section, key in (("data", "root"), ("model", "weights"), ("run", "output")):
        config[section][key] = Path(config[section][key]).name
    return {
        "results": {record["network"]: record for record in run.evaluations},
        "training_minutes": round(run.minutes, 1),
        "manifest": run.manifest,
        "config": config,
        "curve": [
            {"iteration": record["iteration"], **{name: round(record[name], 4) for name in CURVE if name in record}}
            for record in run.training
        ],
    }


def main(argv: list[str] | None = None) -> int:
    """Write the file; returns the exit status."""
    parser = CommandLine(prog="python -m bench.runs.collect", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=result_file, required=True)
    arguments = parser.parse_args(argv)
    write_json(arguments.output, {run.name: collect(run) for run in arguments.runs})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
