"""Peak memory of a training step, predicted: `python bench/memory.py [CONFIG] [key=value ...] [--out FILE.json]`.

No GPU is needed: the fused engine's own step runs on tensors without data (device "meta"), in bfloat16 as on a GPU,
with the Triton operators recorded instead of launched; every storage is counted while it lives. So parameters, moments,
moving average, gradients and what autograd keeps are exact for blocks that are not compiled. Left out: what a kernel
holds while it runs, workspaces of matrix products and convolutions, the allocator's gaps and the CUDA context. The
table of GPUs adds SLACK and CONTEXT for these; compiled blocks keep less than counted here.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: the clone comes first on the path, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.arguments import require_positive, result_file, split_settings
from bench.steps.memory import CONTEXT, SLACK, predict_all, print_tables
from bench.steps.providers import class_count
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.config.parsing import load_config
from cosa_fast.errors import UserError
from cosa_fast.files import write_json
from cosa_fast.run import manifest


def main(argv: list[str] | None = None) -> int:
    """Predict the grid; returns the exit status."""
    parser = CommandLine(prog="python bench/memory.py", description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key=value", help="default: voc.yaml")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 2, 4, 8, 16, 32))
    parser.add_argument("--out", type=result_file, help="JSON")
    arguments = parser.parse_intermixed_args(argv)
    require_positive(arguments, "batch_sizes")
    names, overrides = split_settings(arguments.settings)
    if len(names) > 1:
        raise UserError(f"{' '.join(names)}: give one configuration")
    name = names[0] if names else "voc.yaml"
    # Random weights: memory does not depend on them. bf16 is what a GPU computes in.
    config = load_config(name, ["model.weights=none", "run.device=cpu", "run.precision=bf16", *overrides])
    num_classes = class_count(config, None)
    rows = predict_all(config, num_classes, arguments.batch_sizes)
    print_tables(rows)
    if arguments.out is not None:
        written = {
            "predicted": True, "commit": manifest.commit(), "torch": torch.__version__, "config": name,
            "overrides": overrides, "crop": config.data.crop_size, "classes": num_classes, "precision": "bfloat16",
            "slack": SLACK, "context_mib": CONTEXT / 2**20, "rows": rows,
        }  # fmt: skip
        write_json(arguments.out, written)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
