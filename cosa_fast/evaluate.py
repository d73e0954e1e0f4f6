"""Evaluate a checkpoint: `python -m cosa_fast.evaluate CKPT [key=value ...] [--network on|an|both]`, or several, in one
table. CKPT may be a file of another program, such as the official release's: `... best_seg.pth data.root=VOC2012`.
"""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cosa_fast.cli import (
    NETWORKS,
    CommandLine,
    add_crf_side,
    add_network,
    is_setting,
    require_two_networks,
    run_cli,
    whole,
)
from cosa_fast.errors import counted
from cosa_fast.evaluation.cleaning import METHODS, check_methods
from cosa_fast.evaluation.comparison import comparison, comparison_legend, short_names
from cosa_fast.evaluation.crf_scores import CrfResult
from cosa_fast.evaluation.evaluator import AnyResult
from cosa_fast.evaluation.networks import NAMES_IN_FILES, load_networks, title
from cosa_fast.files import require_place, write_json
from cosa_fast.run.evaluating import configure, evaluate_crf, evaluate_networks


def main(argv: list[str] | None = None) -> int:
    """Evaluate one checkpoint and print a table per network, or several and print one table of all. Returns the exit
    status."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.json is not None:
        require_place(arguments.json, "--json")
    paths = [arguments.checkpoint, *(text for text in arguments.others if not is_setting(text))]
    if arguments.crf is not None:
        check_methods(_methods(arguments.crf))
    first = _Evaluation(paths[0], arguments)
    # What cannot be evaluated is told before the work on the others.
    singles = [first.networks.single, *(_Evaluation(path, arguments).networks.single for path in paths[1:])]
    require_two_networks(arguments.network, ", ".join(paths), all(singles))
    record = first.show() if len(paths) == 1 else _compare(paths, arguments)
    if arguments.json is not None:
        write_json(arguments.json, record)
        print(f"written: {arguments.json}")
    return 0


class _Evaluation:
    """One checkpoint: opened and checked, then evaluated as the arguments say."""

    def __init__(self, path: str, arguments: Namespace) -> None:
        overrides = [text for text in arguments.others if is_setting(text)]
        self.path = path
        self.networks = load_networks(path, config=arguments.config, overrides=overrides)
        self.config = configure(self.networks, overrides, path)
        if arguments.split is not None:
            self.config = replace(self.config, data=replace(self.config.data, val_split=arguments.split))
        self.results: dict[str, AnyResult] = {}
        self.cleaned: dict[str, CrfResult] = {}
        self._arguments = arguments
        self._names = (NETWORKS[arguments.network],) if arguments.network in NETWORKS else ("on", "an")

    @property
    def shown(self) -> tuple[str, ...]:
        """The networks that people are shown: of two that are one, one."""
        return self._names[:1] if self.networks.single else self._names

    @property
    def place(self) -> str:
        """Which images, in words."""
        result = next(iter(self.results.values()))
        where = f"of {self.config.data.val_split}" if self.config.data.val_split else "held out of the training"
        limited = self._arguments.limit is None and result.images != result.set_size
        return f"{result.extent} {where}{' (eval.limit)' * limited}"

    def evaluate(self) -> None:
        """Fill `results`."""
        self.results = evaluate_networks(self.networks, self.config, self._names, limit=self._arguments.limit)

    def clean(self) -> None:
        """Fill `cleaned`, where a CRF was asked for."""
        if self._arguments.crf is not None:
            limit, side = self._arguments.limit, self._arguments.crf_side
            methods = _methods(self._arguments.crf)
            self.cleaned = evaluate_crf(self.networks, self.config, self._names, methods, limit=limit, side=side)

    def show(self) -> dict[str, Any]:
        """Evaluate, print everything as soon as it is known, and return it."""
        if self.networks.imported is not None:
            print(self.networks.imported)
        self.evaluate()
        for name in self.shown:
            print(f"{self.title(name)} at iteration {self.networks.iteration}, {self.place}")
            print(f"{self.results[name].table()}\n")
        print(next(iter(self.results.values())).legend())
        for note in self.notes():
            print(note)
        self.clean()
        for name in self.shown if self.cleaned else ():
            crf = self.cleaned[name]
            print(f"\n{self.title(name)} with CRF, {counted(crf.images, 'image')}\n{crf.table()}")
        return self.record()

    def title(self, name: str) -> str:
        """Of the network "on" or "an"."""
        return title(name, self.config)

    def notes(self) -> list[str]:
        """What must be said beside the figures."""
        found, data = [], self.config.data
        if self.config.eval.protocol == "squashed":
            found.append(
                f"images squashed to {data.crop_size}x{data.crop_size} as the official release does, ξ and ξ† a fixed "
                "0.5; else eval.protocol=native"
            )
        if self.networks.bias is not None and self.networks.chosen.get("on") == data.val_split:
            found.append(self.networks.bias)
        return found

    def record(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        config = self.config
        record: dict[str, Any] = {"checkpoint": self.path, "iteration": self.networks.iteration}
        record |= {"split": config.data.val_split, "root": config.data.root, "scales": list(config.eval.scales)}
        record |= {"flip": config.eval.flip, "protocol": config.eval.protocol}
        for name, result in self.results.items():
            figures = {"images": result.images, "summary": result.summary(), "per_class": result.per_class()}
            record[NAMES_IN_FILES[name]] = figures
        for name, crf in self.cleaned.items():
            record[NAMES_IN_FILES[name]]["crf"] = {"images": crf.images, "summary": crf.summary()}
        return record


def _compare(paths: Sequence[str], arguments: Namespace) -> dict[str, Any]:
    """Evaluate one after the other, print one table, and return every figure."""
    rows: list[tuple[str, dict[str, float]]] = []
    words: set[str] = set()
    places, notes, records = [], [], []
    for path, name in zip(paths, short_names(paths), strict=True):
        evaluation = _Evaluation(path, arguments)
        evaluation.evaluate()
        evaluation.clean()
        for each in evaluation.shown:
            cleaned = evaluation.cleaned[each].summary() if evaluation.cleaned else {}
            rows.append((f"{name} {evaluation.title(each)}", {**evaluation.results[each].summary(), **cleaned}))
        data = evaluation.config.data
        places.append(f"{evaluation.place}, {data.root}")
        notes += [f"{name}: {note}" for note in evaluation.notes()]
        records.append(evaluation.record())
        words |= next(iter(evaluation.results.values())).words()
        print(f"{name}: {places[-1]}", flush=True)
    print(f"\n{comparison(rows)}")
    if len(set(places)) > 1:
        notes.insert(0, "these are not the same images: compare the figures with care")
    print("\n".join(["", comparison_legend(rows, words), *notes]))
    return {"checkpoints": records}


def _methods(crf: str) -> tuple[str, ...]:
    return tuple(METHODS) if crf == "both" else (crf,)


def _name(text: str) -> str:
    if not text:  # an unset variable of a shell, which would stand for what is held out
        raise ArgumentTypeError("is empty; give a split by its name")
    return text


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m cosa_fast.evaluate",
        description="mIoU of a checkpoint's networks on a set with masks; without masks, image AP and agreement.",
    )
    parser.add_argument("checkpoint", help="a file of runs/NAME/checkpoints, or a weight file of another program")
    parser.add_argument(
        "others",
        nargs="*",
        metavar="CHECKPOINT|key=value",
        help="more checkpoints, all compared in one table; settings to change, e.g. data.root=... eval.scales=[1.0]",
    )
    add_network(parser, "both", "both")
    parser.add_argument(
        "--config", metavar="YAML", help="for files of other programs: settings; default: voc_ or coco_published.yaml"
    )
    parser.add_argument(
        "--split", metavar="NAME", type=_name, short_for="data.val_split", help="short for data.val_split=NAME"
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=whole(1),
        short_for="eval.limit",
        help="only N images, evenly spread over the set",
    )
    parser.add_argument(
        "--crf", choices=(*METHODS, "both"), help="also clean the segmentations up by a CRF; both says how they agree"
    )
    add_crf_side(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure there")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
