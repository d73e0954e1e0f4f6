"""Threshold estimators on a run's own maps: `python bench/thresholds.py RUN [RUN ...] [--images N] [--out FILE.json]`.

For every checkpoint in the runs' folders: the confidences of AN's M' and M†' on images with masks, the fixed threshold
that is best for the pseudo-label, and how many points of mIoU each estimator of the threshold loses against it. Choose
on images held out of the training set (data.val_split), never on those that are reported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.arguments import require_positive, result_file
from bench.runs.estimators import MAPS, compare, mean_losses
from bench.tables import aligned, number
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.config.parsing import saved_config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
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
    # What is wrong with one of them is told before the work on the others.
    opened = [_open(Path(run), arguments.from_iteration) for run in arguments.runs]
    rows: list[dict[str, Any]] = []
    for dataset, checkpoints in opened:
        for checkpoint in checkpoints:
            rows.append(compare(checkpoint, dataset, min(arguments.images, len(dataset)), print))
            losses = mean_losses(rows)
            if arguments.out is not None:
                write_json(arguments.out, {"commit": manifest.commit(), "mean_losses": losses, "rows": rows})
    lines = [[label, *(number(loss.get(name), ".2f") for name in MAPS)] for label, loss in losses.items()]
    print(f"\npoints of mIoU below the best fixed threshold, mean of {counted(len(rows), 'checkpoint')}")
    print(aligned(["", *MAPS], lines))
    return 0


def _open(run: Path, first: int) -> tuple[ImageDataset, list[Path]]:
    """The run's validation set, and its checkpoints from iteration `first` on. UserError where thresholds cannot be
    compared on them."""
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise UserError(f"{run}: no run (it lacks config.yaml); give a folder that a training wrote, such as runs/voc")
    config = saved_config(folder.config)
    if config.model.standalone:
        raise UserError(f"{run}: {config.model.architecture} has no CAM, and no threshold; give a run of CoSA")
    checkpoints = [path for path in folder.numbered() if int(path.stem) >= first]
    if not checkpoints:
        raise UserError(f"{run}: no checkpoint from iteration {first} on; lower --from-iteration, or leave it out")
    dataset = open_validation_set(config)
    if not dataset.has_masks:
        raise UserError(f"{run}: its validation images have no masks, so no threshold can be judged")
    return dataset, checkpoints


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
