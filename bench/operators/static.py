"""The part of the kernel benchmark that needs no GPU: what every kernel takes of a multiprocessor, and the limits.

The public functions run, forward and backward, on tensors that are only allocated; their launches are recorded, and
compiled for each architecture (kernels/launch/offline.py). Of the compiled code instructions are counted, and it is
proved that no two threads touch the same byte of shared memory unordered (bench/proofs).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench.operators.cases import OPERATORS, Problem, base_sizes, static_sizes
from bench.operators.limits import PREDICTED_H200
from bench.operators.output import machine
from bench.operators.scene import Size
from bench.proofs import listing, races
from bench.tables import failure
from cosa_fast.errors import UserError
from cosa_fast.kernels.launch.offline import ARCHITECTURES, Compiled, compile_launches, source_hash
from cosa_fast.kernels.launch.runtime import HAS_TRITON, INTERPRETED, Launch, record_launches

Row = dict[str, Any]
# What this process has compiled and found out: operators share kernels, and sizes do.
_known: dict[Any, Compiled] = {}
_found: dict[tuple[int, bool], Row] = {}


def compile_all(names: list[str], architectures: list[str], *, quick: bool, processes: int) -> Row:
    """The results of the operators' kernels on the architectures. UserError where nothing can be compiled."""
    if not HAS_TRITON:
        raise UserError("the package triton is not installed: there is nothing to compile; pip install triton")
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is set, but kernels are compiled here; unset it")
    rows = resource_rows(names, architectures, quick=quick, processes=processes)
    whole = (names, architectures, quick) == ([*OPERATORS], [*ARCHITECTURES], False)
    lines = [f"{line} ({_name(row)})" for row in rows for line in row.pop("open_pairs", [])]
    return {
        "kind": "static", "machine": machine(torch.device("cpu")),
        "kernels_hash": source_hash() if whole else None,  # a part of it says nothing of all kernels
        "open_pairs": lines, "rows": rows, "limits": limit_rows(names, quick=quick),
    }  # fmt: skip


def resource_rows(names: Sequence[str], architectures: Sequence[str], *, quick: bool, processes: int) -> list[Row]:
    """One row per operator, size, architecture and kernel; a failure is a row with "error"."""
    tasks = [(name, architecture, quick) for architecture in architectures for name in names]
    if processes == 1:
        found = list(map(_rows_of, tasks))
    else:
        # A fresh interpreter each: torch's threads do not survive a fork.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(_rows_of, tasks))
    return [row for rows in found for row in rows]


def limit_rows(names: Sequence[str], *, quick: bool) -> list[Row]:
    """One row per operator, size and mode: what it must move and compute, and the least time for that on one H200."""
    rows = []
    for name in names:
        for size in dict.fromkeys(base_sizes(name, quick=quick) + static_sizes(name, "sm_90", quick=quick)):
            for mode, cost in OPERATORS[name].problem(size, torch.device("cpu"), filled=False).costs.items():
                milliseconds, what = PREDICTED_H200.least(cost)
                rows.append(
                    {**_subject(name, size), "mode": mode, **asdict(cost), "limit_ms": milliseconds, "limited_by": what}
                )
    return rows


def record(problem: Problem, architecture: str) -> list[Launch]:
    """The launches of forward and backward on that architecture; results are undefined."""
    with record_launches(architecture) as launches:
        results = problem.function(*problem.arguments, **problem.keywords, backend="triton")
        if problem.inputs:
            gradients = [torch.empty_like(result) for result in tensors(results)]
            torch.autograd.grad(tensors(results), problem.inputs, gradients)
    if not launches:
        raise RuntimeError("no kernel was launched")
    return launches


def tensors(results: Any) -> tuple[Tensor, ...]:
    """An operator's results as a tuple; those that work in place have none."""
    if results is None:
        return ()
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _rows_of(task: tuple[str, str, bool]) -> list[Row]:
    name, architecture, quick = task
    torch.set_num_threads(1)
    sizes = static_sizes(name, architecture, quick=quick)
    return [row for size in sizes for row in _compile(name, size, architecture, prove=not quick)]


def _compile(name: str, size: Size, architecture: str, *, prove: bool) -> list[Row]:
    subject = _subject(name, size)
    try:
        launches = record(OPERATORS[name].problem(size, torch.device("cpu"), filled=False), architecture)
        compiled = compile_launches(launches, architecture, _known)
        return [{**subject, **each.as_row(), **_read(each, prove)} for each in compiled]
    except Exception as error:  # of any kind: the other operators are still worth knowing
        return [{**subject, "architecture": architecture, "error": failure(error)}]


def _read(compiled: Compiled, prove: bool) -> Row:
    """Instructions, and the accesses to shared memory, how many of them may lie anywhere, the barriers and what stays
    unproved; null and nothing where that was not asked for."""
    key = (id(compiled), prove)
    if key not in _found:
        counted = listing.count(compiled.code, compiled.threads, compiled.blocks)
        if prove:
            proof = races.prove(compiled.code["llir"], compiled.threads, compiled.warp, compiled.shared)
            proved: Row = {
                "accesses": proof.accesses, "anywhere": proof.anywhere, "barriers": proof.barriers,
                "meeting": proof.meeting, "open": len(proof.open), "open_pairs": proof.open,
            }  # fmt: skip
        else:
            proved = dict.fromkeys(("accesses", "anywhere", "barriers", "meeting", "open"))
        _found[key] = {**counted, **proved}
    return dict(_found[key])


def _name(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("operator", "classes", "dtype", "kernel", "architecture"))


def _subject(name: str, size: Size) -> Row:
    return {"operator": name, **asdict(size)}
