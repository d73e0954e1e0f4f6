"""A page of a run, or of several side by side: `python -m cosa_fast.report RUN [RUN ...] [-o FILE]`."""

from pathlib import Path

from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.errors import UserError
from cosa_fast.files import require_place
from cosa_fast.report.page import write_page
from cosa_fast.report.reading import runs_in
from cosa_fast.run.folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    """Write the page and print where. Returns the exit status."""
    parser = CommandLine(
        prog="python -m cosa_fast.report",
        description="One self-contained page: curves, thresholds, perplexity, classes, confusions, pictures.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folders of runs, such as runs/voc, or folders with such in them, such as runs",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: RUN/report.html; needed for several runs"
    )
    arguments = parser.parse_args(argv)
    runs = [run for place in arguments.runs for run in runs_in(place)]
    if arguments.output is None and len(runs) > 1:
        names = f"{', '.join(map(str, runs[:8]))}{', ...' * (len(runs) > 8)}"
        raise UserError(f"several runs ({names}) make one page: say where to, for example -o comparison.html")
    output = arguments.output or RunFolder(runs[0]).report
    if arguments.output is not None or runs[0].is_dir():
        require_place(output, "-o")
    print(f"written: {write_page(runs, output)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
