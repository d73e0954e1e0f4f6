"""Evaluate a checkpoint: `python -m cosa_fast.evaluate CKPT [key=value ...] [--network on|an|both]`.

CKPT may be a file of another program, such as the official release's: `... best_seg.pth data.root=VOC2012`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from cosa_fast.cli import NETWORKS, add_crf_side, run_cli
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError
from cosa_fast.evaluation.cleaning import METHODS, check_methods
from cosa_fast.evaluation.evaluator import AnyResult
from cosa_fast.evaluation.networks import NAMES_IN_FILES, load_networks, title
from cosa_fast.files import write_json
from cosa_fast.run.evaluating import configure, evaluate_crf, evaluate_networks


def main(argv: list[str] | None = None) -> int:
    """Evaluate a checkpoint and print a table per network. Returns the exit status."""
    arguments = _parser().parse_intermixed_args(argv)
    networks = load_networks(arguments.checkpoint, config=arguments.config, overrides=arguments.overrides)
    if networks.imported is not None:
        print(networks.imported)
    config = configure(networks, arguments.overrides, arguments.checkpoint)
    if arguments.split is not None:
        config = replace(config, data=replace(config.data, val_split=arguments.split))
    if arguments.crf is not None:
        check_methods(_methods(arguments.crf))
    if arguments.json is not None:
        _prepare_output(arguments.json)
    names = ("on", "an") if arguments.network == "both" else (NETWORKS[arguments.network],)
    results = evaluate_networks(networks, config, names, limit=arguments.limit)
    shown = names[:1] if networks.single else names  # both are one network
    for name in shown:
        result = results[name]
        limited = " (eval.limit)" if arguments.limit is None and result.images != result.set_size else ""
        print(
            f"{title(name, config)} at iteration {networks.iteration}, {result.extent} {_place(config)}{limited}\n"
            f"{result.table()}\n"
        )
    print(next(iter(results.values())).legend())
    if config.eval.protocol == "squashed":
        side = f"{config.data.crop_size}x{config.data.crop_size}"
        print(
            f"images squashed to {side} as the official release does, ξ and ξ† a fixed 0.5; else eval.protocol=native"
        )
    if networks.bias is not None and networks.chosen.get("on") == config.data.val_split:
        print(networks.bias)
    cleaned = {}
    if arguments.crf is not None:
        methods = _methods(arguments.crf)
        cleaned = evaluate_crf(networks, config, names, methods, limit=arguments.limit, side=arguments.crf_side)
    for name in shown if cleaned else ():
        print(f"\n{title(name, config)} with CRF, {cleaned[name].images} images\n{cleaned[name].table()}")
    if arguments.json is not None:
        record = _record(arguments.checkpoint, networks.iteration, config, results)
        for name, crf in cleaned.items():
            record[NAMES_IN_FILES[name]]["crf"] = {"images": crf.images, "summary": crf.summary()}
        write_json(arguments.json, record)
        print(f"written: {arguments.json}")
    return 0


def _methods(crf: str) -> tuple[str, ...]:
    return tuple(METHODS) if crf == "both" else (crf,)


def _place(config: Config) -> str:
    return f"of {config.data.val_split}" if config.data.val_split else "held out of the training"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cosa_fast.evaluate",
        description="mIoU of a checkpoint's networks on a set with masks; without masks, image AP and agreement.",
    )
    parser.add_argument("checkpoint", help="a file of runs/NAME/checkpoints, or a weight file of another program")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, e.g. data.root=... eval.scales=[1.0]"
    )
    parser.add_argument("--network", choices=(*NETWORKS, "both"), default="both", help="default: both")
    parser.add_argument(
        "--config", metavar="YAML", help="for files of other programs: settings; default: voc_ or coco_published.yaml"
    )
    parser.add_argument("--split", metavar="NAME", help="short for data.val_split=NAME")
    parser.add_argument("--limit", metavar="N", type=int, help="only N images, evenly spread over the set")
    parser.add_argument(
        "--crf", choices=(*METHODS, "both"), help="also clean the segmentations up by a CRF; both says how they agree"
    )
    add_crf_side(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _prepare_output(path: Path) -> None:
    """Find out before the work, not after it, that the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); choose another file") from error


def _record(checkpoint: str, iteration: int, config: Config, results: dict[str, AnyResult]) -> dict[str, Any]:
    record: dict[str, Any] = {"checkpoint": checkpoint, "iteration": iteration, "split": config.data.val_split}
    record |= {"root": config.data.root, "scales": list(config.eval.scales), "flip": config.eval.flip}
    record["protocol"] = config.eval.protocol
    for name, result in results.items():
        figures = {"images": result.images, "summary": result.summary(), "per_class": result.per_class()}
        record[NAMES_IN_FILES[name]] = figures
    return record


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
