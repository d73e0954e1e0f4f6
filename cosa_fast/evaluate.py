"""Evaluate a checkpoint: `python -m cosa_fast.evaluate CKPT [key=value ...] [--network student|teacher|both]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import config_from_dict, config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.device import compute_type, pick_device
from cosa_fast.errors import UserError
from cosa_fast.evaluation.evaluator import evaluate_network
from cosa_fast.evaluation.networks import Networks, load_networks
from cosa_fast.evaluation.result import EvalResult
from cosa_fast.files import write_json
from cosa_fast.run.data import Pipeline, choose_pipeline, loading

# The rest of the configuration shaped the weights; changing it here would change nothing, silently.
SECTIONS = ("data", "teacher", "eval", "run")
NAMES = {"student": "student (ON)", "teacher": "teacher (AN)"}


def evaluate(
    networks: Networks, config: Config, names: Sequence[str], *, limit: int | None = None
) -> dict[str, EvalResult]:
    """Evaluate the named networks ("student", "teacher") of a checkpoint on config.data's val_split."""
    device = pick_device(config.run.device)
    dataset = _open(config, networks.classes)
    pipeline, _ = choose_pipeline(config, device)
    return {name: _evaluate(networks, name, dataset, config, device, limit, pipeline) for name in names}


def configure(networks: Networks, overrides: Sequence[str], where: str) -> Config:
    """The checkpoint's configuration with overrides of what an evaluation uses; UserError for other sections."""
    for override in overrides:
        section = override.partition("=")[0].partition(".")[0]
        if section in {"model", "threshold", "loss", "optim"}:
            raise UserError(
                f"override '{override}': {section} belongs to the training of {where}; "
                f"an evaluation can change {', '.join(SECTIONS)}"
            )
    return config_from_dict(config_to_dict(networks.config), overrides, where=where)


def main(argv: list[str] | None = None) -> int:
    """Evaluate a checkpoint and print a table per network. Returns the exit status."""
    arguments = _parser().parse_intermixed_args(argv)
    networks = load_networks(arguments.checkpoint)
    config = configure(networks, arguments.overrides, arguments.checkpoint)
    if arguments.split is not None:
        config = replace(config, data=replace(config.data, val_split=arguments.split))
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if arguments.json is not None:
        _prepare_output(arguments.json)
    names = ("student", "teacher") if arguments.network == "both" else (arguments.network,)
    results = evaluate(networks, config, names, limit=arguments.limit)
    for name, result in results.items():
        print(
            f"{NAMES[name]} at iteration {networks.iteration}, {result.images} images of {config.data.val_split}\n"
            f"{result.table()}\n"
        )
    print("label-free: argmax over all classes; label-aware and the CAMs: told which classes the image holds")
    if arguments.json is not None:
        _write_json(arguments.json, arguments.checkpoint, networks.iteration, config, results)
        print(f"written: {arguments.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cosa_fast.evaluate", description="mIoU of a checkpoint's networks on a set with masks."
    )
    parser.add_argument("checkpoint", help="a file of runs/NAME/checkpoints")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, e.g. data.root=... eval.scales=[1.0]"
    )
    parser.add_argument("--network", choices=("student", "teacher", "both"), default="both", help="default: both")
    parser.add_argument("--split", metavar="NAME", help="short for data.val_split=NAME")
    parser.add_argument("--limit", metavar="N", type=int, help="only N images, evenly spread over the set")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _open(config: Config, classes: tuple[str, ...]) -> ImageDataset:
    data = config.data
    return open_dataset(
        data.format, data.root, data.val_split, labels=data.labels, classes=data.classes, need_labels=False
    )


def _evaluate(
    networks: Networks,
    name: str,
    dataset: ImageDataset,
    config: Config,
    device: torch.device,
    limit: int | None,
    pipeline: Pipeline,
) -> EvalResult:
    model = (networks.student if name == "student" else networks.teacher).to(device)
    with tqdm(desc=NAMES[name], unit="image", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return evaluate_network(
            model,
            dataset,
            classes=networks.classes,
            eval=config.eval,
            teacher=config.teacher,
            mean=config.data.mean,
            std=config.data.std,
            device=device,
            thresholds=networks.thresholds,
            limit=limit,
            progress=progress,
            loading=loading(config, pipeline),
            dtype=compute_type(config.run.precision, device),
        )


def _prepare_output(path: Path) -> None:
    """Find out before the work, not after it, that the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); choose another file") from error


def _write_json(path: Path, checkpoint: str, iteration: int, config: Config, results: dict[str, EvalResult]) -> None:
    record: dict[str, Any] = {"checkpoint": checkpoint, "iteration": iteration, "split": config.data.val_split}
    record |= {"root": config.data.root, "scales": list(config.eval.scales), "flip": config.eval.flip}
    for name, result in results.items():
        record[name] = {
            "images": result.images,
            "summary": result.summary(),
            "per_class": result.per_class(),
        }
    write_json(path, record)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
