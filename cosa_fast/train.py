"""Train: `python -m cosa_fast.train voc.yaml [key=value ...] [--resume auto] [--profile N]`."""

from cosa_fast.cli import CommandLine, run_cli, whole
from cosa_fast.config.parsing import load_config
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.signals import resumable


def main(argv: list[str] | None = None) -> int:
    """Train as a configuration file says; prints the last evaluation. Returns the exit status."""
    parser = CommandLine(prog="python -m cosa_fast.train", description="Train CoSA.")
    parser.add_argument("config", help="YAML file, or the name of a shipped one: voc.yaml, coco.yaml, demo.yaml, ...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. optim.batch_size=8")
    parser.add_argument(
        "--resume", metavar="auto|CHECKPOINT", help="continue the run from its newest or a given checkpoint"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run of the same name")
    parser.add_argument(
        "--profile",
        type=whole(1),
        metavar="N",
        help="profile N iterations into runs/NAME/profile: its trace and a table",
    )
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    folder = RunFolder.of(config)
    another_s = set() if arguments.resume else _checkpoints(folder)
    with resumable(lambda: not _checkpoints(folder) <= another_s):
        from cosa_fast.evaluation.networks import title
        from cosa_fast.report.page import write
        from cosa_fast.run.training import train  # here, where signals are obeyed: it takes seconds

        summary = train(
            config, resume=arguments.resume, overwrite=arguments.overwrite, profile=arguments.profile, report=write
        )
    for name, result in summary.results.items():
        print(f"\n{title(name, config)} at iteration {summary.iteration}, {result.extent}\n{result.table()}")
    if summary.results:
        print(f"\n{summary.results['an'].legend()}\nwritten to {summary.directory}")
    return 0


def _checkpoints(folder: RunFolder) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_mtime_ns) for path in folder.checkpoints.glob("*.pt")}


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
