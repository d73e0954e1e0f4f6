"""Ablations: `python bench/ablate.py ABLATIONS.yaml [key=value ...] [--like ABLATIONS] [--base CONFIG] [--jobs N]`.

Trains every row of the file with every seed, each run in a folder of its own, and ends with tables of means and of
differences by seed. Given again, the command goes on where it stopped. docs/ablations.md has the file's format and the
matrices in bench/ablations/.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.arguments import require_positive, result_file
from bench.runs.ablation import print_plan, report, save_chart, train_all
from bench.runs.matrix import load_matrix
from cosa_fast.cli import CommandLine, run_cli


def main(argv: list[str] | None = None) -> int:
    """Train what is left of the matrix and print the tables. Returns the exit status: 1 if a run failed, 130 after
    Ctrl-C."""
    parser = CommandLine(prog="python bench/ablate.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("ablations", help="YAML file, or the name of a shipped one: table3.yaml, table4.yaml, fig1.yaml, ...")
    add("overrides", nargs="*", metavar="key=value", help="settings for all runs, after the file's own common ones")
    add("--like", metavar="ABLATIONS", help="take base, common overrides and seeds from that file, e.g. animals.yaml")
    add("--base", metavar="CONFIG", help="configuration to use in place of the file's base")
    add("--output", metavar="DIR", help="where the runs' folders go; default: runs/NAME")
    add("--out", type=result_file, help="JSON; text, Markdown and chart go beside it; default: DIR/NAME.json")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time: a GPU each, or a share of the cores")
    add("--dry-run", action="store_true", help="say what would be done, and end")
    arguments = parser.parse_intermixed_args(argv)
    require_positive(arguments, "jobs")
    given = {"like": arguments.like, "base": arguments.base, "overrides": arguments.overrides}
    matrix = load_matrix(arguments.ablations, arguments.output, **given)
    if arguments.dry_run:
        print_plan(matrix.runs)
        return 0
    out = arguments.out or result_file(str(matrix.runs[0].folder.path.parent / f"{matrix.name}.json"))
    try:
        failures = train_all(matrix, arguments.jobs, lambda: report(matrix, out))
    except KeyboardInterrupt:
        print("stopped: the same command goes on from what the runs have saved", file=sys.stderr)
        return 130
    print(f"\n{report(matrix, out)}")
    save_chart(matrix, out)
    print(f"written {out}, with .txt and .md beside it")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
