"""Do runs that should be alike have the same curves? `python -m bench.runs.curves RUN_A RUN_B ... -o FILE.json`.

Runs are folders left by bench/runs/pipelines.sh or any training, named SET_PIPELINE_SEED. Per set: loss terms as means
over windows of iterations, how far they differ between pipelines with one seed and between seeds with one pipeline, and
the last evaluations.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

TERMS = ("loss", "cls", "cls_aux", "c2s", "c2s_aux", "s2c", "csc", "xi", "xi_aux")
FIGURES = ("seg_label_free", "seg_label_aware", "cam_best")
Curve = dict[int, dict[str, float]]


def read(run: Path, window: int) -> tuple[Curve, dict[str, Any]]:
    """Means of each term over windows that end at multiples of `window` iterations; the run's commit, and its figures
    by network."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["kind"] == "train":
            grouped[-(-record["iteration"] // window) * window].append(record)
    curve = {
        end: {t: statistics.fmean(r[t] for r in rows if t in r) for t in TERMS if any(t in r for r in rows)}
        for end, rows in grouped.items()
    }
    evaluations = [record for record in records if record["kind"].startswith("eval_")]
    figures = {e["network"]: {name: e[name] for name in FIGURES if name in e} for e in evaluations}
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return curve, {"commit": manifest["commit"], "evaluation": figures}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--window", type=int, default=20, help="iterations of a mean")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    sets: dict[str, dict[tuple[str, str], Any]] = defaultdict(dict)
    for run in arguments.runs:
        name, pipeline, seed = run.name.rsplit("_", 2)
        sets[name][pipeline, seed] = read(run, arguments.window)
    # The machine is that of all runs; the commit is each run's own.
    machine = json.loads((arguments.runs[0] / "manifest.json").read_text(encoding="utf-8"))
    del machine["commit"]
    config = yaml.safe_load((arguments.runs[0] / "config.yaml").read_text(encoding="utf-8"))
    result = {
        "machine": machine, "window": arguments.window, "optim_of_first_run": config["optim"],
        "sets": {name: compare(runs) for name, runs in sets.items()},
    }  # fmt: skip
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, compared in result["sets"].items():
        for kind, terms in compared["largest_difference_between"].items():
            print(name, f"between {kind}:", "  ".join(f"{term} {value:.1%}" for term, value in terms.items()))
        for run in compared["runs"]:
            print(name, run["pipeline"], "seed", run["seed"], run["evaluation"])


if __name__ == "__main__":
    main()
