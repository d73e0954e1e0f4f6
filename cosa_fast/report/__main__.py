"""A page of a run, or of several side by side: `python -m cosa_fast.report RUN [RUN ...] [-o FILE]`."""

import argparse
from pathlib import Path

from cosa_fast.cli import run_cli
from cosa_fast.errors import UserError
from cosa_fast.report.page import write_page
from cosa_fast.run.folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    """Write the page and print where. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cosa_fast.report",
        description="One self-contained page: curves, thresholds, perplexity, classes, confusions, pictures.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, such as runs/voc")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: RUN/report.html; needed for several runs"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    arguments = parser.parse_args(argv)
    if arguments.output is None and len(arguments.runs) > 1:
        raise UserError("several runs make one page: say where to, for example -o comparison.html")
    output = write_page(arguments.runs, arguments.output or RunFolder(arguments.runs[0]).report)
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
