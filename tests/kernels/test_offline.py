"""Every kernel compiles for every architecture at the shipped configurations, without spills, within shared memory."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cosa_fast.kernels
from cosa_fast.kernels.launch.offline import ARCHITECTURES
from cosa_fast.kernels.launch.runtime import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
IN_CLASSES = {"fuse_cams", "raw_cross_entropy", "seg_to_cam_loss", "contrastive_separation"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The static part of the kernel benchmark, made in a process whose Triton compiles instead of interpreting."""
    folder = tmp_path_factory.mktemp("offline")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "bench/kernels.py", "--static", "--processes", "2", "--out", str(folder / "static.json")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    table = run.stdout.partition("\nPredicted limits")[0]
    print(table)
    return {**json.loads((folder / "static.json").read_text(encoding="utf-8")), "table": table}


def test_no_kernel_fails_to_compile(report: dict[str, Any]) -> None:
    failures = [row for row in report["rows"] if "error" in row]
    assert not failures, "\n".join(map(str, failures))


def test_no_kernel_spills_registers(report: dict[str, Any]) -> None:
    spilling = [row for row in report["rows"] if row.get("spills")]
    assert not spilling, f"{_lines(spilling)}\n{report['table']}"


def test_shared_memory_is_within_every_architectures_limit(report: dict[str, Any]) -> None:
    over = [row for row in report["rows"] if row.get("shared", 0) > row.get("shared_limit", 0)]
    assert not over, f"{_lines(over)}\n{report['table']}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_the_package_was_compiled(report: dict[str, Any], architecture: str) -> None:
    compiled = {
        (row["module"], row["kernel"])
        for row in report["rows"]
        if row["architecture"] == architecture and "error" not in row
    }
    defined = defined_kernels()
    assert defined, "no kernel was found"
    assert compiled == defined, f"not compiled: {sorted(defined - compiled)}, unknown: {sorted(compiled - defined)}"


@pytest.mark.parametrize("operator", cosa_fast.kernels.__all__)
def test_every_operator_was_compiled_at_the_shipped_sizes(report: dict[str, Any], operator: str) -> None:
    rows = [row for row in report["rows"] if row["operator"] == operator]
    for architecture in ARCHITECTURES:
        found = {(row["classes"], row["dtype"]) for row in rows if row["architecture"] == architecture}
        assert (20, "bf16") in found
        if operator in IN_CLASSES:
            assert {(20, "bf16"), (80, "bf16"), (1203, "bf16")} <= found
            assert "fp32" in {dtype for _, dtype in found}
    if operator in IN_CLASSES:
        assert {(20, "fp32"), (80, "fp32"), (1203, "fp32")} <= {(row["classes"], row["dtype"]) for row in rows}


def defined_kernels() -> set[tuple[str, str]]:
    """(module, name) of all Triton functions of the package whose names end in _kernel."""
    found = set()
    for module in pkgutil.iter_modules(cosa_fast.kernels.__path__):
        for value in vars(importlib.import_module(f"cosa_fast.kernels.{module.name}")).values():
            # Compiled or interpreted, a Triton function keeps the Python function as `fn`.
            name = getattr(getattr(value, "fn", None), "__name__", "")
            if name.endswith("_kernel"):
                found.add((value.fn.__module__.rpartition(".")[2], name))
    return found


def _lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        " ".join(
            str(row[name])
            for name in ("operator", "classes", "dtype", "variant", "architecture", "kernel", "configuration")
        )
        + f": {row['registers']} registers, {row['spills']} bytes of spills, {row['shared']} bytes shared"
        for row in rows
    )
