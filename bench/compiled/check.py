"""The kernels' own tests on compiled kernels, executed on a CPU: `python -m bench.compiled.check [--out FILE.json]`.

In the environment of requirements.txt (`make test-compiled` makes it). One file after the other, each in a process of
its own; compiling takes most of the time, seconds for each specialisation of a kernel.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.arguments import result_file
from bench.gpu.tests import ROOT, run
from bench.operators.output import machine
from bench.tables import aligned
from cosa_fast.cli import run_cli
from cosa_fast.errors import UserError, hint
from cosa_fast.files import read_json, write_json
from cosa_fast.kernels.launch.offline import source_hash

# Files of tests/kernels that run kernels, the quickest first.
FILES = (
    "perplexity", "triton_functions", "adamw_ema", "fuse_cams", "seg_to_cam_loss", "raw_cross_entropy", "shares",
    "contrastive_separation", "bilateral_filter", "dense_energy", "fit_mixture", "histogram",
)  # fmt: skip
# Triton 3.3 cannot, for reasons of its own.
LEFT_OUT = {"histogram": "tl.histogram takes no mask before Triton 3.4"}
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run them; returns 1 if any test fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled.check", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="NAME", help=f"of {', '.join(FILES)}; default: all")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS", help="of a file")
    parser.add_argument("--out", type=result_file, help="JSON; what it holds of other files stays")
    asked = parser.parse_args(argv)
    for name in asked.files:
        if name not in FILES:
            raise UserError(f"no file {name!r}; want of {', '.join(FILES)}{hint(name, FILES)}")
    _set_environment()
    results = _kept(asked.out)
    for name in asked.files or FILES:
        if name in LEFT_OUT and not asked.files:
            results["rows"][name] = {"left_out": LEFT_OUT[name]}
            continue
        results["rows"][name] = _run(name, asked.limit)
        print(name, results["rows"][name], flush=True)
        if asked.out:
            write_json(asked.out, results)
    print(table(results["rows"]))
    return int(any(row.get("error") or row.get("failed") for row in results["rows"].values()))


def _kept(out: Path | None) -> Row:
    """Results that are written to, with rows of the same kernels that are there already."""
    kept = read_json(out) if out and out.is_file() else {}
    rows = kept.get("rows", {}) if kept.get("kernels_hash") == source_hash() else {}
    return {"machine": machine(torch.device("cpu")), "kernels_hash": source_hash(), "rows": rows}


def _set_environment() -> None:
    """Of the tests' processes: where OpenCL's runtime lies, which is installed beside Python's libraries."""
    library = Path(sys.prefix) / "lib" / "libintelocl.so"
    if not library.exists():
        raise UserError(f"{library} is not there; `make test-compiled` makes an environment that has it")
    vendors = Path(sys.prefix) / "opencl"
    vendors.mkdir(exist_ok=True)
    (vendors / "cpu.icd").write_text(f"{library}\n", encoding="utf-8")
    os.environ |= {
        "OCL_ICD_VENDORS": str(vendors), "LD_LIBRARY_PATH": str(library.parent), "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(Path(sys.prefix) / "triton"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def _run(name: str, limit: float) -> Row:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "compiled.json"
        arguments = ["-p", "bench.compiled.plugin", f"--compiled={told}", "-W", "ignore"]
        row = run(ROOT / "tests" / "kernels" / f"test_{name}.py", Path(folder), arguments, limit)
        compiled = read_json(told) if told.exists() else {}
    del row["file"]
    return {**row, **compiled, "seconds": round(time.perf_counter() - start)}


def table(rows: dict[str, Row]) -> str:
    """A line per file."""
    head = [
        "tests/kernels/test_...",
        "passed",
        "failed",
        "skipped",
        "kernels",
        "launches",
        "barriers put in",
        "crashed",
    ]
    names = ("passed", "failed", "skipped", "kernels", "launches", "barriers", "crashed")
    lines = [[name, *(str(row.get(each, "-")) for each in names)] for name, row in rows.items()]
    notes = [f"{name}: {row.get('left_out') or row.get('error')}" for name, row in rows.items() if "passed" not in row]
    failed = [f"{name}: {' '.join(row['names'])}" for name, row in rows.items() if row.get("failed")]
    return "\n".join([aligned(head, lines), *notes, *failed])


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
