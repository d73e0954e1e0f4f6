"""A run of CoSA-MS beside the CoSA that it learned from: `python -m bench.runs.standalone EVALUATION.json RUN -o FILE`.

EVALUATION.json is what `python -m cosa_fast.evaluate CHECKPOINT --json` wrote of CoSA, RUN the folder of the finished
run. The pseudo-labels of RUN are measured against the masks of the training images, which no training has read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from bench.arguments import result_file
from bench.runs.collect import collect
from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import ignored
from cosa_fast.data_pipeline.datasets.masks import ignore_index
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.datasets.pseudo_labels import PseudoLabelled
from cosa_fast.evaluation.evaluator import class_indices
from cosa_fast.evaluation.metrics import ConfusionMatrix, mean_iou
from cosa_fast.files import read_json, write_json
from cosa_fast.run.folder import RunFolder


def pseudo_label_quality(config: Config) -> dict[str, Any]:
    """mIoU in percent of the training images' pseudo-labels against their masks, over eval.classes and background."""
    data = config.data
    dataset = open_dataset(data.format, data.root, data.train_split, labels=data.labels, classes=data.classes)
    labelled = PseudoLabelled(dataset, Path(str(data.pseudo_labels)), data.train_split)
    matrix = ConfusionMatrix(len(dataset.classes) + 1)
    for index in range(len(dataset)):
        truth, found = (torch.from_numpy(each.mask(index)) for each in (dataset, labelled))
        truth[ignored(found)] = ignore_index(len(dataset.classes))
        matrix.update(found, truth)
    indices = (0, *class_indices(config.eval.classes or dataset.classes, dataset.classes, "eval.classes"))
    return {"images": len(dataset), "miou": 100 * float(mean_iou(matrix.iou(), indices))}


def main(argv: list[str] | None = None) -> int:
    """Write the file, and print its figures; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.runs.standalone", description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("-o", "--output", type=result_file, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    cosa = read_json(arguments.evaluation)
    for key in ("checkpoint", "root"):
        cosa[key] = "/".join(Path(cosa[key]).parts[-3:])
    run = collect(arguments.run)
    run["config"]["data"]["pseudo_labels"] = Path(run["config"]["data"]["pseudo_labels"]).name
    pseudo_labels = pseudo_label_quality(load_config(RunFolder(arguments.run).config))
    write_json(arguments.output, {"cosa": cosa, "pseudo_labels": pseudo_labels, "standalone": run})
    for name, summary in (("CoSA, AN", cosa["teacher"]["summary"]), ("standalone", run["results"]["teacher"])):
        print(f"{name:11} label-free {summary['seg_label_free']:.1f}  label-aware {summary['seg_label_aware']:.1f}")
    print(f"pseudo-labels of {pseudo_labels['images']} training images: {pseudo_labels['miou']:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
