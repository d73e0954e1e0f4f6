"""Threshold estimators on a run's own maps: `python bench/thresholds.py RUN [RUN ...] [--images N] [--out FILE.json]`.

For every checkpoint in the runs' folders: the confidences of AN's M' and M†' on images with masks, the fixed threshold
that is best for the pseudo-label, and how many points of mIoU each estimator of the threshold loses against it. Choose
on images held out of the training set (data.val_split), never on those that are reported.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.arguments import require_positive, result_file
from bench.runs.estimators import MAPS, compare, mean_losses
from bench.tables import aligned
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.errors import UserError, counted
from cosa_fast.files import write_json
from cosa_fast.run import manifest
from cosa_fast.run.data import open_validation_set
from cosa_fast.run.folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    """Compare the estimators; returns the exit status."""
    parser = CommandLine(prog="python bench/thresholds.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--images", type=int, default=100, help="so many, evenly spread over the set (default 100)")
    parser.add_argument("--from-iteration", type=int, default=1, help="leave earlier checkpoints out")
    parser.add_argument("--out", type=result_file, help="JSON")
    arguments = parser.parse_args(argv)
    require_positive(arguments, "images", "from_iteration")
    rows = []
    for run in arguments.runs:
        folder = RunFolder(Path(run))
        dataset = open_validation_set(load_config(str(folder.config), []))
        if not dataset.has_masks:
            raise UserError(f"{run}: its validation images have no masks, so no threshold can be judged")
        for checkpoint in folder.numbered():
            if int(checkpoint.stem) >= arguments.from_iteration:
                rows.append(compare(checkpoint, dataset, min(arguments.images, len(dataset)), print))
    if not rows:
        raise UserError(f"{' '.join(arguments.runs)}: no checkpoint there")
    losses = mean_losses(rows)
    lines = [[label, *(f"{loss[name]:.2f}" for name in MAPS)] for label, loss in losses.items()]
    print(f"\npoints of mIoU below the best fixed threshold, mean of {counted(len(rows), 'checkpoint')}")
    print(aligned(["", *MAPS], lines))
    if arguments.out is not None:
        write_json(arguments.out, {"commit": manifest.commit(), "mean_losses": losses, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
