"""Results of the kernel benchmark on the terminal, as JSON, CSV and a plot; and the machine that they are of."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.operators.cases import Size
from cosa_fast.run import manifest

Row = dict[str, Any]
COLOURS = {"ours": "C2", "eager": "C7", "compiled": "C0"}


def machine(device: torch.device) -> Row:
    """What the figures were taken on, with which versions, and when."""
    facts: Row = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": manifest.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": manifest.package_version("triton"),
        "machine": platform.machine(),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return facts


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def write(path: Path, results: Row, *, plot: bool = False) -> None:
    """JSON at `path`, the rows as CSV beside it, and with `plot` a picture of measured rows. A file is whole or old."""
    _replace(path, json.dumps(results, indent=1) + "\n")
    rows = results["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    beside = path.with_suffix(".csv")
    aside = beside.with_name(beside.name + ".tmp")
    with open(aside, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    os.replace(aside, beside)
    if plot and results["kind"] == "measured":
        if importlib.util.find_spec("matplotlib") is None:
            print("no plot: the package matplotlib is not installed", file=sys.stderr)
        else:
            _plot(path.with_suffix(".png"), results)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def print_static(results: Row) -> None:
    """Two tables: registers, spills and shared memory per kernel and architecture; predicted limits per operator."""
    print(static_table(results["rows"]))
    print("\nPredicted limits, one H200: the least time for the bytes, exponentials and flops that cannot be avoided")
    print(
        _aligned(
            ["operator", "size", "mode", "MB", "M exps", "Mflop", "limit ms", "by"],
            [
                [
                    row["operator"], _size(row), row["mode"], f"{row['bytes'] / 1e6:.2f}", f"{row['exps'] / 1e6:.1f}",
                    f"{row['flops'] / 1e6:.0f}", f"{row['limit_ms']:.4f}", row["limited_by"],
                ]
                for row in results["limits"]
            ],
        )
    )  # fmt: skip


def static_table(rows: Sequence[Row]) -> str:
    """A line per operator, size and kernel; a column per architecture: the most registers / bytes of spills / KiB of
    shared memory of its specialisations."""
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    lines: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        key = (row["operator"], _size(row), str(row.get("kernel", row.get("error"))))
        lines.setdefault(key, {}).setdefault(row["architecture"], []).append(row)
    return "Registers / bytes of spills / KiB of shared memory\n" + _aligned(
        ["operator", "size", "kernel", *architectures],
        [
            [*key, *(_resources(found.get(architecture, [])) for architecture in architectures)]
            for key, found in lines.items()
        ],
    )


def _resources(rows: list[Row]) -> str:
    rows = [row for row in rows if "error" not in row]
    if not rows:
        return "-"
    registers, spills, shared = (max(row[name] for row in rows) for name in ("registers", "spills", "shared"))
    return f"{registers} / {spills} / {shared / 1024:.1f}"


def print_measured(results: Row) -> None:
    """A line per operator, size and mode; milliseconds of every provider, launched and replayed."""
    limits, facts = results["limits"], results["machine"]
    print(
        f"{facts['gpu']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}, {facts['date']}"
    )
    print(
        f"limits {limits['source']}: {limits['bytes'] / 1e12:.2f} TB/s, {limits['exps'] / 1e12:.2f} T exp/s, "
        f"{limits['flops'] / 1e12:.1f} Tflop/s; a replay takes {1e3 * limits['replay_ms']:.1f} µs, "
        f"and {1e3 * limits['next_launch_ms']:.2f} µs for every further launch"
    )
    print("milliseconds: launched from the host | replayed from a CUDA graph; MiB: extra memory")
    print(_aligned(MEASURED_HEAD, [_measured_line(key, found) for key, found in _by_mode(results["rows"]).items()]))
    for row in results["rows"]:
        for kind in ("error", "reason"):
            if row.get(kind) and not str(row[kind]).startswith("not run"):
                where = f"{row['operator']} {_size(row)} {row['provider']} {row['mode'] or ''}"
                print(f"{kind}: {where.strip()}: {row[kind]}")


MEASURED_HEAD = [
    "operator", "size", "mode", "ours", "eager", "compiled", "MiB ours", "eager", "compiled", "speed-up",
    "limit ms", "by", "share", "launches",
]  # fmt: skip
Found = dict[tuple[str, bool], Row]


def _by_mode(rows: Iterable[Row]) -> dict[tuple[str, str, str], Found]:
    """Rows by operator, size and mode; each by provider and whether it is a replay."""
    found: dict[tuple[str, str, str], Found] = {}
    for row in rows:
        if "limit_ms" in row:
            key = (row["operator"], _size(row), row["mode"])
            found.setdefault(key, {})[row["provider"], row["graph"]] = row
    return found


def _measured_line(key: tuple[str, str, str], found: Found) -> list[str]:
    def times(provider: str) -> str:
        return " | ".join(_number(found.get((provider, graph), {}).get("ms")) for graph in (False, True))

    def memory(provider: str) -> str:
        extra = found.get((provider, False), {}).get("extra_bytes")
        return "-" if extra is None else f"{extra / 2**20:.1f}"

    ours = _best(found, "ours")
    others = [row["ms"] for row in (_best(found, name) for name in ("compiled", "eager")) if row][:1]
    launches = found.get(("ours", False), {}).get("launches")
    speed_up = f"{others[0] / ours['ms']:.1f}x" if ours and others else "-"
    any_row = next(iter(found.values()))
    bound: str = any_row["limited_by"]
    floor = ours.get("launch_floor_ms")
    if floor is not None and ours["ms"] <= 1.5 * floor:
        bound += ", launches"
    return [
        *key, *map(times, COLOURS), *map(memory, COLOURS), speed_up, _number(any_row["limit_ms"]), bound,
        f"{100 * ours['share']:.0f} %" if ours else "-", "-" if launches is None else str(launches),
    ]  # fmt: skip


def _best(found: Found, provider: str) -> Row:
    """The replay where there is one, else the launched run; empty where neither was timed."""
    timed = [row for graph in (True, False) if (row := found.get((provider, graph), {})).get("ms") is not None]
    return timed[0] if timed else {}


def _number(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.4g}"


def _size(row: Row) -> str:
    return str(Size(*(row[field.name] for field in fields(Size))))


def _aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *lines)
    )


def _plot(path: Path, results: Row) -> None:
    """Bars of the base sizes, then one picture of lines per sweep and operator; the faster of launched and replayed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = [row for row in results["rows"] if row.get("ms") and row["mode"] in ("both", "forward")]
    differentiable = {row["operator"] for row in whole if row["mode"] == "both"}
    whole = [row for row in whole if row["mode"] == "both" or row["operator"] not in differentiable]
    sweeps = list(dict.fromkeys((row["sweep"], row["operator"]) for row in whole if row["sweep"]))
    rows = -(-len(sweeps) // 4)
    figure = pyplot.figure(figsize=(16, 5 + 3.2 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, 4, height_ratios=[1.5, *[1] * rows])
    _bars(figure.add_subplot(grid[0, :]), _by_mode(row for row in whole if not row["sweep"]))
    for index, (axis, operator) in enumerate(sweeps):
        chosen = [row for row in whole if (row["sweep"], row["operator"]) == (axis, operator)]
        _lines(figure.add_subplot(grid[1 + index // 4, index % 4]), axis, operator, chosen)
    figure.suptitle(f"{results['machine']['gpu']}: forward and backward, milliseconds (dashes: limit)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, cases: dict[tuple[str, str, str], Found]) -> None:
    for shift, provider in enumerate(COLOURS):
        heights = [_best(found, provider).get("ms", 0.0) for found in cases.values()]
        places = [index + 0.27 * (shift - 1) for index in range(len(cases))]
        axes.bar(places, heights, 0.25, label=provider, color=COLOURS[provider])
    for index, found in enumerate(cases.values()):
        least = next(iter(found.values()))["limit_ms"]
        axes.plot([index - 0.4, index + 0.4], [least] * 2, "k--", linewidth=1)
    labels = [f"{operator}\n{size}" for operator, size, _ in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=6, rotation=90)
    axes.set_yscale("log")
    axes.legend()


def _lines(axes: Any, axis: str, operator: str, rows: list[Row]) -> None:
    name = "batch" if axis == "pairs" else axis
    for provider, colour in COLOURS.items():
        best: dict[int, float] = {}
        for row in rows:
            if row["provider"] == provider:
                best[row[name]] = min(row["ms"], best.get(row[name], row["ms"]))
        if best:
            axes.plot(sorted(best), [best[at] for at in sorted(best)], "o-", color=colour, label=provider)
    limits = {row[name]: row["limit_ms"] for row in rows}
    axes.plot(sorted(limits), [limits[at] for at in sorted(limits)], "k--", linewidth=1)
    axes.set(xscale="log", yscale="log", title=operator, xlabel=axis)
