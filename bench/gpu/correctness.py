"""Every kernel against its definition, and the captured step against the plain one, at the sizes of training:
`python -m bench.gpu.correctness [--out FILE.json]`.

Three-way: the kernel's error against the definition in float64 may not exceed that of the definition in the kernel's
own types by more than a tolerance. Errors are ‖found − truth‖ / ‖truth‖. What a kernel writes in place is compared
too; every result is computed twice and must be the same bit for bit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.arguments import result_file
from bench.operators.cases import OPERATORS, Problem
from bench.operators.output import machine
from bench.operators.scene import COCO, VOC, Size
from bench.operators.static import tensors
from bench.steps.providers import synthetic_batch
from bench.tables import aligned, failure
from cosa_fast.cli import run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.plain import Engine
from cosa_fast.files import write_json

# Beyond the definition's own error, by the type in which a result is handed out.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DISAGREEING = 1e-4  # share of the elements of an integer result: ties
STEP_TOLERANCE = 2e-3  # of a loss, relative, after a few steps that differ in rounding
# Kernels that keep what they are given in float32, or count: their definition is their truth in these types.
NO_DOUBLE = frozenset({"adamw_ema_", "histogram", "fit_mixture"})
Row = dict[str, Any]
SMALL = [
    "model.backbone=vit_tiny_patch16_224", "model.weights=none", "data.crop_size=128", "optim.batch_size=4",
    "teacher.scales=[1.0,0.5]", "model.decoder_width=64", "optim.iterations=100", "optim.warmup=0",
    "model.arguments={img_size: 128, embed_dim: 96, depth: 4, num_heads: 3}", "run.precision=fp32", "run.compile=off",
]  # fmt: skip


def sizes(name: str, tiny: bool) -> list[Size]:
    """Where an operator is checked: VOC and COCO as trained, then other types and variants at smaller batches."""
    axes = OPERATORS[name].axes
    if tiny:
        return [Size(2, 1, 32 if "pairs" in axes else 16, "fp32", "probability" if "pairs" in axes else "")]
    if "dense" in axes:
        return [Size(batch=1, resolution=224), Size(batch=1, resolution=224, dtype="fp32")]
    classes = (VOC, COCO) if "classes" in axes else (VOC,)
    found = [Size(count) for count in classes] + [Size(count, 4, dtype="fp32") for count in classes if "dtype" in axes]
    variants = [("probability", "pairs"), ("published", "published"), ("groups", "groups"), ("batch", "pairs")]
    return found + [Size(batch=4, variant=variant) for variant, axis in variants if axis in axes]


def check(name: str, size: Size, device: torch.device) -> Iterator[Row]:
    """A row for every result and gradient of an operator; one with "error" if it fails."""
    subject = {"operator": name, **asdict(size)}
    try:
        problem = OPERATORS[name].problem(size, device)
        ours, again = (outcome(problem, "triton") for _ in range(2))
        plain = outcome(problem, "reference")
        truth = plain if name in NO_DOUBLE else outcome(problem, "reference", double=True)
        for what, value in ours.items():
            yield {**subject, "result": what, **compare(value, again[what], plain[what], truth[what])}
    except Exception as error:  # of any kind: the other operators are still worth knowing
        yield {**subject, "result": None, "good": False, "error": failure(error)}


def outcome(problem: Problem, backend: str, *, double: bool = False) -> dict[str, Tensor]:
    """Results, gradients and what was written in place, by name, computed on copies of the problem's inputs."""
    copies: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(copied(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        copies[id(value)] = copy.double() if double and copy.is_floating_point() else copy
        return copies[id(value)].requires_grad_(value.requires_grad)

    arguments, keywords = copied(problem.arguments), {key: copied(value) for key, value in problem.keywords.items()}
    results = tensors(problem.function(*arguments, **keywords, backend=backend))
    found = {f"result {index}": result.detach() for index, result in enumerate(results)}
    if problem.inputs:
        inputs = [copies[id(value)] for value in problem.inputs]
        # Unequal weights: a sum alone would hide results that are swapped.
        weights = [torch.linspace(0.5, 1.5, max(result.numel(), 2), device=result.device) for result in results]
        total = sum((r.double().flatten() * w[: r.numel()]).sum() for r, w in zip(results, weights, strict=True))
        assert isinstance(total, Tensor)
        found |= {f"gradient {i}": g for i, g in enumerate(torch.autograd.grad(total, inputs))}
    if not results:
        found |= {f"written {index}": value for index, value in enumerate(arguments) if isinstance(value, Tensor)}
        found |= {f"written {key}": value for key, value in keywords.items() if isinstance(value, Tensor)}
    return found


def compare(found: Tensor, again: Tensor, plain: Tensor, truth: Tensor) -> Row:
    """The errors of ours and of the definition in the same types, and whether that is good."""
    repeats = bool(torch.equal(found, again))
    if not truth.is_floating_point():
        share = float((found != truth).double().mean())
        return {"difference": share, "plain": 0.0, "repeats": repeats, "good": repeats and share <= DISAGREEING}
    difference, usual = _relative(found, truth), _relative(plain, truth)
    good = repeats and difference <= usual + TOLERANCES[found.dtype]  # a NaN compares as False
    return {"difference": difference, "plain": usual, "repeats": repeats, "good": good}


def _relative(found: Tensor, truth: Tensor) -> float:
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


def check_steps(device: torch.device, tiny: bool) -> Iterator[Row]:
    """The loss of a fused step (on a GPU captured after three) against the plain engine's, in float32, both phases."""
    steps = 2 if tiny else 6
    small = [] if not tiny else ["data.crop_size=64", "model.arguments.img_size=64", "model.arguments.depth=3"]
    kinds = {"fused": [], "packed": ["teacher.attention=packed"], "accumulate": ["optim.accumulate=2"]}
    for name, overrides in list(kinds.items())[: 1 if tiny else None]:
        subject = {"operator": "step", "variant": name, "result": "loss"}
        try:
            config = load_config("voc.yaml", [*SMALL, *small, f"optim.cotrain_after={steps}", *overrides])
            batch = synthetic_batch(config, 5, device)
            engines = [kind(config, 5, device) for kind in (FusedEngine, Engine)]
            losses = [[float(engine.step(batch)["loss"]) for engine in engines] for _ in range(2 * steps)]
            worst = max(abs(a - b) / abs(b) for a, b in losses)
            engines[0].check()
            refusal = engines[0].not_captured
            yield {**subject, "difference": worst, "not_captured": refusal, "good": worst <= STEP_TOLERANCE}
        except Exception as error:
            yield {**subject, "good": False, "error": failure(error)}


def measure_all(device: torch.device, tiny: bool, deadline: float, save: Callable[[Row], None]) -> Row:
    """All checks, given to `save` after each; none starts after `deadline` (time.monotonic)."""
    rows: list[Row] = []
    results = {"machine": machine(device), "rows": rows}
    checks: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        (f"{name} {size}", lambda name=name, size=size: check(name, size, device))
        for turn in range(4)
        for name in OPERATORS
        for size in sizes(name, tiny)[turn : turn + 1 if turn < 3 else None]
    ]
    checks.insert(len(OPERATORS), ("step", lambda: check_steps(device, tiny)))
    for title, rows_of in checks:
        if time.monotonic() > deadline:
            rows.append({"operator": title, "result": None, "good": None, "error": "not run: the budget was spent"})
            continue
        for row in rows_of():
            rows.append(row)
            save(results)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    save(results)
    return results


def print_table(rows: Sequence[Row]) -> None:
    """What is not good, line by line; else one line."""
    checked = [row for row in rows if row["good"] is not None]
    bad = [row for row in checked if not row["good"]]
    print(f"{len(checked) - len(bad)} of {len(checked)} results are right, {len(rows) - len(checked)} checks not run")
    lines = [
        [str(row["operator"]), str(row.get("classes", "")), str(row.get("dtype", "")), str(row.get("variant", "")),
         str(row.get("result")), str(row.get("error") or f"{row['difference']:.2e}"), f"{row.get('plain', 0.0):.2e}"]
        for row in bad
    ]  # fmt: skip
    if lines:
        print(aligned(["operator", "classes", "type", "variant", "result", "error", "definition's"], lines, words=7))


def main(argv: list[str] | None = None) -> int:
    """Check; returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.correctness", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tiny", action="store_true", help="a walk through at tiny sizes, on a CPU with TRITON_INTERPRET=1"
    )
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; after them no check starts")
    parser.add_argument("--out", type=result_file, help="JSON")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.budget
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # float32 means float32 here: TF32 would drown what is looked for.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    out: Path | None = arguments.out
    results = measure_all(device, arguments.tiny, deadline, lambda found: write_json(out, found) if out else None)
    print_table(results["rows"])
    return int(any(row["good"] is False for row in results["rows"]))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
