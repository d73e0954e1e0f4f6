"""Do runs that should be alike have the same curves? `python -m bench.runs.curves RUN_A RUN_B ... -o FILE.json`.

Runs are folders left by bench/runs/pipelines.sh or any training, named SET_PIPELINE_SEED. Per set: loss terms as means
over windows of iterations, how far they differ between pipelines with one seed and between seeds with one pipeline, and
the last evaluations.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

from bench.arguments import require_positive, result_file
from bench.runs.reading import read_run
from bench.tables import TERMS
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.errors import UserError
from cosa_fast.files import write_json

FIGURES = ("seg_label_free", "seg_label_aware", "cam_best")
Curve = dict[int, dict[str, float]]


def read(path: Path, window: int) -> tuple[Curve, dict[str, Any]]:
    """Means of each term over windows that end at multiples of `window` iterations; the run's commit, and its figures
    by network."""
    run = read_run(path)
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in run.training:
        grouped[-(-record["iteration"] // window) * window].append(record)
    curve = {
        end: {t: statistics.fmean(r[t] for r in rows if t in r) for t in TERMS if any(t in r for r in rows)}
        for end, rows in grouped.items()
    }
    figures = {e["network"]: {name: e[name] for name in FIGURES if name in e} for e in run.evaluations}
    return curve, {"commit": run.manifest["commit"], "evaluation": figures}


def difference(a: Curve, b: Curve) -> dict[str, float]:
    """Largest difference of a term's window means, relative to its mean over both curves."""
    result = {}
    for term in TERMS:
        pairs = [(a[end][term], b[end][term]) for end in a if term in a[end] and term in b.get(end, {})]
        if pairs:
            scale = statistics.fmean(value for pair in pairs for value in pair)
            result[term] = max(abs(x - y) for x, y in pairs) / scale
    return result


def compare(runs: dict[tuple[str, str], tuple[Curve, dict[str, Any]]]) -> dict[str, Any]:
    """Differences of the runs of one set, by (pipeline, seed)."""
    between: dict[str, list[dict[str, float]]] = {"pipelines": [], "seeds": []}
    for (key, (a, _)), (other, (b, _)) in combinations(runs.items(), 2):
        if key[1] == other[1]:
            between["pipelines"].append(difference(a, b))
        elif key[0] == other[0]:
            between["seeds"].append(difference(a, b))
    largest = {
        name: {term: max(row[term] for row in rows if term in row) for term in rows[0]} if rows else {}
        for name, rows in between.items()
    }
    return {
        "largest_difference_between": largest,
        "runs": [
            {"pipeline": pipeline, "seed": seed, **facts, "curve": curve}
            for (pipeline, seed), (curve, facts) in runs.items()
        ],
    }


def main(argv: list[str] | None = None) -> int:
    """Compare and write the file; returns the exit status."""
    parser = CommandLine(prog="python -m bench.runs.curves", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="SET_PIPELINE_SEED")
    parser.add_argument("--window", type=int, default=20, help="iterations of a mean")
    parser.add_argument("-o", "--output", type=result_file, required=True)
    arguments = parser.parse_args(argv)
    require_positive(arguments, "window")
    sets: dict[str, dict[tuple[str, str], Any]] = defaultdict(dict)
    for path in arguments.runs:
        parts = path.name.rsplit("_", 2)
        if len(parts) < 3:
            raise UserError(f"{path}: not named SET_PIPELINE_SEED; rename the run's folder")
        sets[parts[0]][parts[1], parts[2]] = read(path, arguments.window)
    first = read_run(arguments.runs[0])
    del first.manifest["commit"]  # the machine is that of all runs; the commit is each run's own
    result = {
        "machine": first.manifest, "window": arguments.window, "optim_of_first_run": first.config["optim"],
        "sets": {name: compare(runs) for name, runs in sets.items()},
    }  # fmt: skip
    write_json(arguments.output, result)
    print_differences(result["sets"])
    return 0


def print_differences(sets: dict[str, dict[str, Any]]) -> None:
    """A line for each kind of difference and for each run."""
    for name, compared in sets.items():
        for kind, terms in compared["largest_difference_between"].items():
            print(name, f"between {kind}:", "  ".join(f"{term} {value:.1%}" for term, value in terms.items()))
        for run in compared["runs"]:
            print(name, run["pipeline"], "seed", run["seed"], run["evaluation"])


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
